"""The plugin class that gives the sweeper and its samplers their names in Hydra's configuration."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

from ._settings import SAMPLERS, OptunaSweeperConf


class Names(SearchPathPlugin):
    """A plugin that stores the names of this sweeper once all plugins are known.

    hydra-optuna-sweeper, where it is left over, has the same names, and the last one to store them is found.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Store the names; the search path stays as it is."""
        store, provider = ConfigStore.instance(), "hydra_study_sweeper"
        store.store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider=provider)
        for name, node in SAMPLERS.items():
            store.store(group="hydra/sweeper/sampler", name=name, node=node, provider=provider)
