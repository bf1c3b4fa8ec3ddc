"""What a selection of directions is asked for, as one validated record."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from datastore.errors import MisuseError
from project.layerspec import parse_layer_requests
from project.ranking import Rules, rules_named

__all__ = ["Criteria"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Criteria:
    """What is asked for; the defaults are those of the command line.

    Attributes
    ----------
    layers : str
        See `parse_layer_requests`.
    traits : sequence of str, optional
        `category/name`, or a name that only one category has; all where None.
    component : str
    method, position : str, optional
        A method is taken instead of the best vector's, without changing which layer is best; a position keeps only the
        vectors, and so the steering results, of that position.
    variant, steering_variant : str, optional
        Model variant that the vectors, and the steering results, are of; needed where there are several.
    prompt_set : str
        Of the steering results.
    rules : str
        `dev`, `main` or `seed`; see `project.ranking`.
    min_coherence, min_naturalness : float, optional
        Instead of those of the rules.
    min_delta : float
        Least change that steering must have reached.
    snap : int
        How far the nearest captured layer may be.
    width : int, optional
        Hidden size of the store's component; vectors of another are refused.
    model : str, optional
        The store's model; vectors neither extracted from it nor steered or made for it are refused.
    force_model : bool
        Accept them all the same.

    Raises
    ------
    MisuseError
        If the layer spec, the name of the rules or the snap is wrong.
    """

    layers: str = "best,best+5"
    traits: Sequence[str] | None = None
    component: str = "residual"
    method: str | None = None
    position: str | None = None
    variant: str | None = None
    steering_variant: str | None = None
    prompt_set: str = "steering"
    rules: str = "dev"
    min_coherence: float | None = None
    min_naturalness: float | None = None
    min_delta: float = 0.0
    snap: int = 2
    width: int | None = None
    model: str | None = None
    force_model: bool = False

    def __post_init__(self) -> None:
        parse_layer_requests(self.layers)
        rules_named(self.rules)
        if self.snap < 0:
            raise MisuseError(f"snap is {self.snap} layers, which no layer is within; give 0 or more")

    def resolved_rules(self) -> Rules:
        """The rule set with what is given instead of its own thresholds."""
        rules = rules_named(self.rules)
        if self.min_coherence is not None:
            rules = replace(rules, min_coherence=self.min_coherence)
        if self.min_naturalness is not None:
            rules = replace(rules, min_naturalness=self.min_naturalness)
        return rules
