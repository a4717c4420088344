"""Sandboxes: programs that nobody trusts, run behind namespaces or Landlock, a system call filter and limits."""
