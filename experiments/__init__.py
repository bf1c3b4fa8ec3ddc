"""The files around a store: transcripts, annotations and experiment trees, read as users have them."""

from experiments.annotations import Span, TextSpan, TokenSpan, read_annotations, token_range
from experiments.direction import Direction, DirectionEntry, directions_of
from experiments.errors import ExperimentError
from experiments.projections import MassiveActivations, Projection, read_massive, read_projection, write_json
from experiments.reading import natural_key, read, read_tags
from experiments.steering import SteeringFile, SteeringResults, find_steering, read_steering
from experiments.transcript import Message, Transcript, Turn
from experiments.tree import Experiment, Variant, read_classifications
from experiments.vectors import (
    DirectionIndex,
    find_directions,
    load_direction,
    read_directions,
    write_directions,
    write_flat,
)

__all__ = [
    "Direction",
    "DirectionEntry",
    "DirectionIndex",
    "Experiment",
    "ExperimentError",
    "MassiveActivations",
    "Message",
    "Projection",
    "Span",
    "SteeringFile",
    "SteeringResults",
    "TextSpan",
    "TokenSpan",
    "Transcript",
    "Turn",
    "Variant",
    "directions_of",
    "find_directions",
    "find_steering",
    "load_direction",
    "natural_key",
    "read",
    "read_annotations",
    "read_classifications",
    "read_directions",
    "read_massive",
    "read_projection",
    "read_steering",
    "read_tags",
    "token_range",
    "write_directions",
    "write_flat",
    "write_json",
]
