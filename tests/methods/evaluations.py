"""A calibration that trains nothing: what is evaluated is looked up by the layers that would have trained."""


class Evaluations:
    """Stands for ``calibration``; ``worth(table)`` is the loss of a table of layers, ``tried`` the tables in their order."""

    def __init__(self, calibration, worth):
        self._calibration, self._worth, self.tried = calibration, worth, []

    def __getattr__(self, name):
        return getattr(self._calibration, name)

    def tuned(self, steps, table=None):
        return table

    def evaluate(self, table):
        self.tried.append({p: tuple(x) for p, x in table.items()})
        return {"loss": self._worth(table)}
