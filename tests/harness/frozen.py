"""Imported last by the fork server: what every job does first, once, so that what it forks finds it done.

Hydra looks for its plugins and learns its grammar, and matplotlib its fonts. Then the garbage collectors of what is
forked look at none of this any more: a full collection of what the libraries have made takes a third of a second, in
every rank and job several times, and writes to its pages, which were shared until then.
"""

import gc
import io

from hydra import compose, initialize_config_dir
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distopt.job.config import CONF

with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
    compose("train")
figure = Figure()
figure.add_subplot(title="$x$").plot([1, 2], label="x")
FigureCanvasAgg(figure).print_png(io.BytesIO())
gc.collect()
gc.freeze()
