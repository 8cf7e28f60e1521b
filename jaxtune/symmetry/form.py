"""Where a transformer keeps what `symmetry.canonical` folds: norms and their readers, hidden biases, a tied readout."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reader:
    """A kernel that reads the stream, its bias (None without one), and the axis that it reads with."""

    kernel: str
    bias: str | None
    axis: int = 0


@dataclass(frozen=True)
class Norm:
    """A norm's gain and offset (None without one), and everything that reads its output.

    `counts_from_one`: the stored gain is what is added to 1.
    """

    scale: str
    bias: str | None
    readers: tuple[Reader, ...]
    counts_from_one: bool = False

    @property
    def keeps_offset(self) -> bool:
        """Whether the offset stays where it is, as a reader has no bias to take it."""
        return self.bias is not None and any(reader.bias is None for reader in self.readers)


@dataclass(frozen=True)
class EntryNorm:
    """A norm whose output *is* the stream, or is added to it, and what writes its input.

    CLIP's `ln_pre`; the norms behind attention and MLP of Gemma 2 and OLMo-2.
    """

    scale: str
    bias: str | None
    writers: tuple[str, ...]
    counts_from_one: bool = False


@dataclass(frozen=True)
class Attention:
    """Leaves of one attention whose biases hide: the value bias acts as an output bias, the key bias not at all.

    `k_bias` is None where the key bias is seen (behind rotary positions, under a cap of the scores) or is not there.
    """

    v_kernel: str
    v_bias: str
    k_bias: str | None
    out_kernel: str
    out_bias: str


@dataclass(frozen=True)
class BranchGain:
    """A gain a channel on what a branch adds to the stream (layer scale), and the leaves that write it."""

    scale: str
    writers: tuple[str, ...]


@dataclass(frozen=True)
class Tie:
    """A token table that is the readout too; folded weights have both, since a gain lies between them.

    Attributes:
        table: The tied leaf, [vocab, width].
        readout: Name of the readout, [width, vocab], in folded weights; the last reader of the norm `scale`.
        scale: Gain of the norm that the readout reads, None where it reads the stream as it is.
    """

    table: str
    readout: str
    scale: str | None


@dataclass(frozen=True)
class Form:
    """Where a transformer of pre-norms keeps what `symmetry.canonical` folds.

    Attributes:
        norms: Norms between the stream and its readers.
        attentions: Attentions with biases that hide.
        writers: Leaves that write the stream, or the input of an entry norm, with their last axis.
        entries: Norms whose output is added to the stream.
        is_centred: Whether norms take the mean away (layer norms), so that the mean of the stream is never seen.
        tie: Where token table and readout are one leaf.
        gains: Gains behind writers.
    """

    norms: tuple[Norm, ...]
    attentions: tuple[Attention, ...]
    writers: tuple[str, ...]
    entries: tuple[EntryNorm, ...] = ()
    is_centred: bool = True
    tie: Tie | None = None
    gains: tuple[BranchGain, ...] = ()

    @property
    def dropped(self) -> frozenset[str]:
        """Leaves of the network that folded weights have no use for."""
        gains = {one.scale for one in (*self.norms, *self.gains)}
        offsets = {norm.bias for norm in self.norms if norm.bias is not None and not norm.keeps_offset}
        biases = {path for attention in self.attentions for path in (attention.v_bias, attention.k_bias) if path}
        return frozenset(gains | offsets | biases)
