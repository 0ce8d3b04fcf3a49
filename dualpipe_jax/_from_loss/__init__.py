"""Finds the pipeline in an ordinary loss function: read `model` first, then `cut`."""

from dualpipe_jax._from_loss.model import LossModel as LossModel
from dualpipe_jax._from_loss.model import from_loss as from_loss
