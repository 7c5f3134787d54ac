"""Dense causal attention."""

import numpy as np

from stf.patterns.component import Component, Kind
from stf.patterns.pattern import Pattern


class Causal(Pattern):
    """Every earlier position and the query itself: `{j : j <= i}` (Eq. 2-4 of Child et al. 2019).

    Examples:
        >>> stf.patterns.Causal().keys(3)
        array([0, 1, 2, 3])
    """

    def _keys(self, i):
        return np.arange(i + 1)

    def _mask(self, i, j):
        return j <= i

    def _component(self):
        return Component(Kind.CAUSAL)
