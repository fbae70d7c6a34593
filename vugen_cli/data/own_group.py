"""Puts the process that imports it into a process group of its own: for the server of `loader.batches` alone.

Ctrl-C in a terminal, torchrun and Slurm signal a whole process group. A run that is told to stop still needs
its workers, for the batches of the step that it ends.
"""

import os

os.setpgrp()
