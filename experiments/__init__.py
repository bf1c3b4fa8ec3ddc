"""The files around a store: transcripts, annotations and experiment trees, read as users have them."""

from experiments.annotations import Span, TextSpan, TokenSpan, read_annotations, token_range
from experiments.errors import ExperimentError
from experiments.reading import natural_key, read, read_tags
from experiments.transcript import Message, Transcript, Turn
from experiments.tree import Experiment, Variant, read_classifications

__all__ = [
    "Experiment",
    "ExperimentError",
    "Message",
    "Span",
    "TextSpan",
    "TokenSpan",
    "Transcript",
    "Turn",
    "Variant",
    "natural_key",
    "read",
    "read_annotations",
    "read_classifications",
    "read_tags",
    "token_range",
]
