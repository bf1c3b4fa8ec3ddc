"""Loads `owner/tiny` at each revision named (- for none), and says what it recorded and what the weights are."""

import json
import logging
import sys

from capture.loading import describe, load, provenance
from capture.skeleton import tensors_of
from capture.tensorfiles import checksum

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for revision in sys.argv[1:]:
        loaded = load(describe("owner/tiny", revision=None if revision == "-" else revision), device="cpu")
        weights = {name: checksum(one) for name, one in tensors_of(loaded.model).items()}
        print(json.dumps({**provenance(loaded), "weights": weights}))
