"""The end of a run that is told to end."""

import signal
import threading
from typing import Any, Self

import keras

from stf.typing import Logs

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(keras.callbacks.Callback):
    """Ends training after the step in hand when SIGTERM or Ctrl-C comes; a second one ends it at once.

    The epoch is ended too, so that checkpoints and logs are written as at every epoch's end; a validation is cut short.
    Where several workers train one `stf.models.SparseTransformer`, a signal to any of them ends all after the same
    step, a few steps later, and validations are not cut short.

    It takes the signals while `fit` runs, or as a context manager while that lasts, over several `fit`s.

    Attributes:
        received: the `signal.Signals` that came, here or to another worker, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: signal.Signals | None = None
        self._asked = False  # whether one came to this process
        self._handlers: dict[signal.Signals, Any] = {}
        self._in_fit = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # which alone may
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_begin(self, logs: Logs = None) -> None:
        """Takes the signals, where nobody has."""
        self._in_fit = not self._handlers
        if self._in_fit:
            self.__enter__()

    def on_train_end(self, logs: Logs = None) -> None:
        """Gives the signals back, where they were taken for this `fit`."""
        if self._in_fit:
            self.__exit__()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Stops the epoch."""
        self.model.asks_to_stop = bool(self.received)
        if getattr(self.model, "told_to_stop", self.received):
            self._stop()

    def on_test_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Stops a validation."""
        if self.received and getattr(self.model, "workers", 1) == 1:
            self.model.stop_evaluating = True

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Stops training."""
        if getattr(self.model, "agree", bool)(bool(self.received)):
            self._stop()

    def _stop(self):
        self.model.stop_training = True
        if not self.received:
            self.received = signal.SIGTERM  # another worker's
            print("another worker stops: stopping too", flush=True)

    def agree(self, model: keras.Model) -> signal.Signals | None:
        """Whether a signal came to any of the workers that train a model: to be called by all of them."""
        if getattr(model, "agree", bool)(bool(self.received)) and not self.received:
            self.received = signal.SIGTERM
        return self.received

    def _note(self, number, frame):
        if self._asked:  # whoever asks twice does not want to wait
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._asked = True
        self.received = self.received or signal.Signals(number)
        print(f"\n{self.received.name}: stopping after this step", flush=True)
