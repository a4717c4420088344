"""Public and light: components of other toolkits as kdkit's, and kdkit's as theirs.

Importing this package loads neither torch nor the other toolkit.
"""

from kdkit.adapters.trl import TrlReward, TrlRewardFunction, as_trl_reward, from_trl_reward

__all__ = ["TrlReward", "TrlRewardFunction", "as_trl_reward", "from_trl_reward"]
