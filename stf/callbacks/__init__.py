"""Keras callbacks: what a run shows in TensorBoard, and how it goes on after a stop."""

from stf.callbacks import drawing, views
from stf.callbacks.attention_maps import AttentionMaps
from stf.callbacks.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from stf.callbacks.moving_average import MovingAverage
from stf.callbacks.non_finite import StopOnNonFinite, first_non_finite
from stf.callbacks.progress import FirstStep, TrainingLog
from stf.callbacks.samples import Samples, log_audio, log_text
from stf.callbacks.stop_on_signal import StopOnSignal

__all__ = [
    "AttentionMaps",
    "Checkpoint",
    "CheckpointError",
    "FirstStep",
    "MovingAverage",
    "Samples",
    "StopOnNonFinite",
    "StopOnSignal",
    "TrainingLog",
    "drawing",
    "first_non_finite",
    "load_checkpoint",
    "log_audio",
    "log_text",
    "views",
]
