"""Kedro's project settings."""

from kedro.config import OmegaConfigLoader

from vlm_latency.hooks import ProjectHooks

HOOKS = (ProjectHooks(),)
CONFIG_LOADER_CLASS = OmegaConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # An environment states only what differs; the rest of a group stays as it was.
    "merge_strategy": {"parameters": "soft"},
}
