"""Kedro's project settings."""

import os
import warnings

from vlm_latency.config_loader import Catalog, ConfigLoader
from vlm_latency.hooks import ProjectHooks

# Kedro's telemetry looks for the consent in the folder a command is given in; ours is: no.
os.environ["KEDRO_DISABLE_TELEMETRY"] = "1"

# Kedro and we speak to omegaconf 2.3 and newer alike; nobody can act on its advice.
warnings.filterwarnings("ignore", message="register_new_resolver")

HOOKS = (ProjectHooks(),)
CONF_SOURCE = "conf"
CONFIG_LOADER_CLASS = ConfigLoader
DATA_CATALOG_CLASS = Catalog
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # An environment states only what differs; the rest of a group stays as it was.
    "merge_strategy": {"parameters": "soft"},
}
