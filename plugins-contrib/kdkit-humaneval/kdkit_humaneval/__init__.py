"""HumanEval for kdkit: functions to write or to repair, judged by their tests in a sandbox."""
