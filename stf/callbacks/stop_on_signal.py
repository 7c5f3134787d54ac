"""The end of a run that is told to end."""

import signal
import threading

import keras

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(keras.callbacks.Callback):
    """Ends training after the step in hand when SIGTERM or Ctrl-C comes; a second one ends it at once.

    The epoch is ended too, so that checkpoints and logs are written as at every epoch's end; a validation is cut short.
    Where several workers train one `stf.models.SparseTransformer`, a signal to any of them ends all after the same
    step, a few steps later, and validations are not cut short.

    Attributes:
        received: the `signal.Signals` that came, or None.
    """

    def __init__(self):
        super().__init__()
        self.received = None
        self._handlers = {}

    def on_train_begin(self, logs=None):
        """Takes the signals, in the main thread, which alone may."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_end(self, logs=None):
        """Gives the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(self, batch, logs=None):
        """Stops the epoch."""
        self.model.asks_to_stop = bool(self.received)
        if getattr(self.model, "told_to_stop", self.received):
            self._stop()

    def on_test_batch_end(self, batch, logs=None):
        """Stops a validation."""
        if self.received and getattr(self.model, "workers", 1) == 1:
            self.model.stop_evaluating = True

    def on_epoch_end(self, epoch, logs=None):
        """Stops training."""
        agree = getattr(self.model, "agree", bool)
        if agree(bool(self.received)):
            self._stop()

    def _stop(self):
        self.model.stop_training = True
        if not self.received:
            self.received = signal.SIGTERM  # another worker's
            print("another worker stops: stopping too", flush=True)

    def _note(self, number, frame):
        if self.received:  # whoever asks twice does not want to wait
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
        print(f"\n{self.received.name}: stopping after this step", flush=True)
