"""A chunk between memory and disk: the codec list, its encoder and a decoder into buffers that are used again.

zarr-python with the same codec list reads the bytes (proved by tests), and writes the same ones but for large chunks of
activations, whose frames `entropy` makes. On this way round it there is no event loop, no copy and no new buffer per
chunk, and the threads of a caller run side by side.
"""

import math
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Self

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.vlen import VLenUTF8
from numpy.typing import NDArray

# Importing these sets numcodecs.blosc.use_threads = False: Blosc then works in the calling thread with the GIL
# released, so that threads scale, and writes its blocks in order, so that the same values give the same bytes.
from zarr.codecs import BloscCodec, Crc32cCodec

from datastore.dtype import numpy_dtype
from datastore.entropy import frame, plane_frame
from datastore.errors import CorruptError, MisuseError
from datastore.schema import DTYPES, Codec

__all__ = ["ChunkDecoder", "decode_text", "encode", "encode_pieces", "zarr_codecs"]

_SHUFFLES: Final = ("noshuffle", "shuffle", "bitshuffle")
_SHUFFLE: Final = {"zstd": 1, "lz4": 2}
"""lz4 has no entropy coder: bfloat16 shrinks 1.03 times after byte shuffle and 1.31 times after bit shuffle."""
_ENTROPY: Final = ("bfloat16", "float32")
"""Of these a search for repeats makes less of more time; of float16 it is the faster, and of float64 the smaller."""
_BLOSC_HEADER: Final = struct.Struct("<4B3I")
_CRC: Final = struct.Struct("<I")
_COUNTS: Final = ("int8", "uint8", "bool", "int32", "int64")
_WITHOUT_ORDER: Final = ("int8", "uint8", "bool")
"""Of one byte: the codec `bytes` then says no byte order."""
_MALFORMED: Final = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What metadata that someone edited may raise; it is then not metadata that is known here."""
_MOST_OVERHEAD: Final = _BLOSC_HEADER.size + _CRC.size


def zarr_codecs(codec: Codec, dtype: str) -> dict[str, Any]:
    """Return what `zarr.create_array` needs to write with `codec`.

    Parameters
    ----------
    codec : Codec
    dtype : str
        Zarr name of the data type; its size is the stride of the shuffle.

    Returns
    -------
    dict
        Keyword argument `compressors`. The serializer is left to Zarr: `bytes`, little-endian, for numbers.
    """
    if codec.name == "none":
        return {"compressors": (Crc32cCodec(),)}
    blosc = BloscCodec(
        typesize=_itemsize(dtype),
        cname=codec.name,
        clevel=codec.level,
        shuffle=_SHUFFLES[_SHUFFLE[codec.name]],
        blocksize=codec.blocksize,
    )
    return {"compressors": (blosc, Crc32cCodec())}


def _itemsize(dtype: str) -> int:
    if dtype in DTYPES:
        return DTYPES[dtype]
    return 1 if dtype == "string" else np.dtype(dtype).itemsize


def encode(values: NDArray[Any], codec: Codec) -> bytes:
    """Return the bytes of one whole chunk as they stand on disk.

    Parameters
    ----------
    values : ndarray
        One chunk in the stored dtype, (tokens, hidden) or (tokens, 1, hidden). A last chunk that the token axis does
        not fill is given whole too, padded with the fill value (NaN), as Zarr stores it.
    codec : Codec

    Returns
    -------
    bytes
        Compressed values and their crc32c, little-endian.
    """
    return b"".join(encode_pieces(values, codec))


def encode_pieces(values: NDArray[Any], codec: Codec, *, sums: bool = False) -> tuple[bytes | memoryview, ...]:
    """Return the same bytes as `encode` in pieces, the last the checksum, so that no one need copy the body.

    Where nothing compresses, the body is the memory of `values` itself. Of `sums` only those bytes are compressed that
    take no time to read.
    """
    values = np.ascontiguousarray(values)
    flat = values.reshape(-1).view(np.uint8)
    if codec.name == "none":
        body: Sequence[Any] = [flat.data]
    else:
        shuffle = _SHUFFLE[codec.name]
        blosc = _blosc(codec.name, codec.level, shuffle=shuffle, blocksize=codec.blocksize, typesize=values.itemsize)
        plain = (codec.name, codec.level) == ("zstd", 1)
        make = plane_frame if sums else frame if values.dtype.name in _ENTROPY else None
        own = make(values, blosc, blocksize=codec.blocksize) if plain and make else None
        body = own or [blosc.encode(flat)]
    crc = 0
    for piece in body:
        crc = google_crc32c.extend(crc, np.frombuffer(piece, np.uint8))
    return *body, _CRC.pack(crc)


@cache
def _blosc(name: str, level: int, *, shuffle: int, blocksize: int, typesize: int) -> Any:
    return Blosc(cname=name, clevel=level, shuffle=shuffle, blocksize=blocksize, typesize=typesize)


def _crc32c(data: NDArray[np.uint8]) -> int:
    return int(google_crc32c.value(data))  # takes arrays and bytes, but no memoryview or bytearray


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDecoder:
    """Decodes the chunks of one array whose chunks hold a run of tokens of one layer.

    Attributes
    ----------
    tokens, width : int
        Shape of a chunk; the last one of an array is stored whole too.
    dtype : numpy.dtype
        The stored dtype.
    blosc, crc32c : bool
        Which codecs follow `bytes`, in this order.
    """

    tokens: int
    width: int
    dtype: np.dtype[Any]
    blosc: bool
    crc32c: bool

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Self | None:
        """Return the decoder for an array's zarr.json, or None when it is to be read through zarr-python.

        Known are arrays (token, layer, hidden) of a stored dtype with chunks (tokens, 1, hidden), the default chunk
        keys, and the codec lists `bytes` (little-endian), then perhaps `blosc`, then perhaps `crc32c`. Sharded or
        transposed arrays, codecs in another order and anything newer are not.
        """
        with suppress(*_MALFORMED):
            shape, chunk = metadata["shape"], _regular_chunk(metadata)
            if chunk is None or len(chunk) != 3 or chunk[1:] != [1, shape[2]]:
                return None
        return cls.of_any(metadata) if metadata.get("data_type") in tuple(DTYPES) else None

    @classmethod
    def of_any(cls, metadata: Mapping[str, Any]) -> Self | None:
        """Return the decoder for an array of numbers of any rank, whose `tokens` are all axes of a chunk but the last.

        The codec lists known are those of `of`.
        """
        with suppress(*_MALFORMED):
            return cls._of_known(metadata)
        return None

    @classmethod
    def _of_known(cls, metadata: Mapping[str, Any]) -> Self | None:
        chunk, name = _regular_chunk(metadata), str(metadata.get("data_type"))
        codecs = [_named(codec) for codec in metadata.get("codecs", ())]
        names = [name for name, _ in codecs]
        known = (
            sys.byteorder == "little"
            and metadata.get("zarr_format") == 3
            and not metadata.get("storage_transformers")
            and (name in DTYPES or name in _COUNTS)
            and _default_keys(metadata)
            and names in (["bytes"], ["bytes", "blosc"], ["bytes", "crc32c"], ["bytes", "blosc", "crc32c"])
            and (codecs[0][1].get("endian") == "little" or name in _WITHOUT_ORDER)
        )
        if not known or not chunk:
            return None
        dtype = numpy_dtype(name) if name in DTYPES else np.dtype(name)
        blosc, crc32c = "blosc" in names, "crc32c" in names
        return cls(tokens=math.prod(chunk[:-1]), width=chunk[-1], dtype=dtype, blosc=blosc, crc32c=crc32c)

    @property
    def nbytes(self) -> int:
        """Bytes of a decoded chunk."""
        return self.tokens * self.width * self.dtype.itemsize

    @property
    def most_bytes(self) -> int:
        """Bytes that an encoded chunk can have at most."""
        return self.nbytes + _MOST_OVERHEAD

    def decode_into(self, raw: bytes | bytearray | memoryview | NDArray[np.uint8], out: NDArray[Any]) -> None:
        """Decode the bytes of one chunk into `out`, without a copy and with the GIL released.

        Parameters
        ----------
        raw : bytes-like
            A chunk as it stands on disk.
        out : ndarray
            Shape (tokens, width) or (tokens, 1, width), the stored dtype, C-contiguous.

        Raises
        ------
        CorruptError
            The checksum differs or the bytes do not decode to a chunk; what `out` holds is then undefined.
        MisuseError
            `out` does not fit.
        """
        if out.dtype != self.dtype or out.nbytes != self.nbytes or not out.flags.c_contiguous:
            raise MisuseError(
                f"a buffer of {out.shape} {out.dtype} can't hold a chunk of {self.tokens} tokens x {self.width} "
                f"{self.dtype}; give a C-contiguous one of that size"
            )
        body = np.frombuffer(raw, np.uint8)
        if self.crc32c:
            body = _checked(body)
        if self.blosc:
            _decompress(body, out.reshape(-1).view(np.uint8))
        elif len(body) != self.nbytes:
            raise CorruptError(f"it holds {len(body)} bytes of values where a chunk has {self.nbytes}")
        else:
            np.copyto(out.reshape(-1).view(np.uint8), body)


def decode_text(raw: bytes, metadata: Mapping[str, Any], *, most: int) -> NDArray[Any]:
    """Decode one chunk of an array of strings that decodes to at most `most` bytes.

    Raises
    ------
    CorruptError
        It was changed, claims to be larger, or holds another number of strings than a chunk does.
    """
    names = [_named(codec)[0] for codec in metadata.get("codecs", ())]
    if names not in (["vlen-utf8", "blosc", "crc32c"], ["vlen-utf8", "crc32c"]):
        raise CorruptError(f"its codecs {names} are not those of strings in a store")
    body = _checked(np.frombuffer(raw, np.uint8))
    if "blosc" in names:
        if len(body) < _BLOSC_HEADER.size:
            raise CorruptError(f"it is cut off: {len(body)} bytes are less than a Blosc header")
        n_bytes = _BLOSC_HEADER.unpack(body[: _BLOSC_HEADER.size].tobytes())[4]
        if n_bytes > most:
            raise CorruptError(f"it claims to decode to {n_bytes:,} bytes, where at most {most:,} can be")
        out = np.empty(n_bytes, np.uint8)
        _decompress(body, out)
        body = out
    n, found = math.prod(_regular_chunk(metadata) or [0]), int.from_bytes(body[:4].tobytes(), "little")
    if len(body) < 4 + 4 * n or found != n:  # before room is made for them
        raise CorruptError(f"it holds {found} strings where a chunk has {n}")
    try:
        return np.asarray(VLenUTF8().decode(body), dtype=object)
    except ValueError as error:
        raise CorruptError(f"its strings do not decode ({error})") from error


def _checked(body: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if len(body) < _CRC.size:
        raise CorruptError(f"it is cut off: {len(body)} bytes are less than a checksum")
    (stored,) = _CRC.unpack(body[-_CRC.size :].tobytes())
    found = _crc32c(body[: -_CRC.size])
    if stored != found:
        raise CorruptError(f"its bytes were changed or cut off: crc32c is {found:08x} where {stored:08x} was written")
    return body[: -_CRC.size]


def _decompress(body: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Decompress a Blosc buffer that fills `out` exactly; Blosc itself trusts the lengths in its header."""
    if len(body) < _BLOSC_HEADER.size:
        raise CorruptError(f"it is cut off: {len(body)} bytes are less than a Blosc header")
    *_, nbytes, _, cbytes = _BLOSC_HEADER.unpack(body[: _BLOSC_HEADER.size].tobytes())
    if nbytes != len(out) or cbytes != len(body):
        raise CorruptError(
            f"its Blosc header tells of {cbytes} bytes that decode to {nbytes}, "
            f"where {len(body)} are there and a chunk has {len(out)}"
        )
    try:
        Blosc().decode(body, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptError(f"it does not decompress ({error})") from error


def _named(codec: Any) -> tuple[str, dict[str, Any]]:
    """Return name and configuration; a Zarr v3 extension without configuration may be its bare name."""
    return (codec, {}) if isinstance(codec, str) else (codec["name"], codec.get("configuration") or {})


def _regular_chunk(metadata: Mapping[str, Any]) -> list[int] | None:
    name, configuration = _named(metadata.get("chunk_grid", ""))
    return list(configuration["chunk_shape"]) if name == "regular" else None


def _default_keys(metadata: Mapping[str, Any]) -> bool:
    name, configuration = _named(metadata.get("chunk_key_encoding", ""))
    return name == "default" and configuration.get("separator", "/") == "/"
