"""A reader of pickles that runs nothing: the opcodes that files of tensors use, and a whitelist of globals.

A pickle is a program for a small stack machine; Python's own reader lets it import and call anything. Here the machine
knows containers, numbers and text, and of globals only those it is handed, each with a function of ours behind it.
Every other global is refused by its name. What a file can make the machine hold is bounded by its length and by
`MAX_OPCODES`; nothing here recurses, whatever the file nests.

Reference:
    https://peps.python.org/pep-3154/ and the comments of CPython's `pickletools`. Left out, since no file of tensors
    has them: the text opcodes of protocol 0, the extension registry, buffers out of band, DUP.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.checkpoint.byte_reader import ByteReader
from jaxtune.checkpoint.pickle_values import Global, Inert, Record, kind_of
from jaxtune.errors import CheckpointError

MAX_BYTES = 100_000_000  # of one pickle; 100 bytes a tensor is much
MAX_OPCODES = 4_000_000  # about 35 a tensor
MAX_INT_BYTES = 64
MAX_KEY = 2**31  # integers far apart can be chosen to collide in a dict, and a million of them never end


def read_pickle(
    data: Any,
    where: str,
    *,
    find_global: Callable[[str, str], Global | None],
    load_persistent: Callable[[Any], Any],
    start: int = 0,
) -> tuple[Any, int]:
    """Reads one pickle.

    Args:
        data: bytes or an mmap.
        where: File and entry, as messages name them.
        find_global: (module, name) -> what stands for it, or None: then it is refused.
        load_persistent: Object for a persistent id; raises `CheckpointError` for what is none.
        start: Where in `data` it begins.

    Returns:
        The value, of dicts, lists, tuples, scalars and what the two functions gave; and the position after it.

    Raises:
        CheckpointError: names the place, what stands there and what to do. Nothing else is raised, whatever the bytes.
    """
    machine = _Machine(data, where, find_global, load_persistent, start)
    return machine.run(), machine.position


class _Machine(ByteReader):
    """Stack and memo; one method per kind of opcode."""

    def __init__(self, data, where, find_global, load_persistent, start):
        super().__init__(data, f"{where}: pickle", start, min(len(data), start + MAX_BYTES))
        self.find_global, self.load_persistent = find_global, load_persistent
        self.stack, self.outer, self.memo = [], [], {}
        self.num_arguments = 0

    def run(self):
        num_opcodes = 0
        while (code := self.take(1)[0]) != _STOP:
            step = _STEPS.get(code)
            if step is None:
                self.refuse(f"the opcode {bytes([code])!r} is none that files of tensors use")
            step(self)
            num_opcodes += 1
            if num_opcodes > MAX_OPCODES:
                self.refuse(f"expected at most {MAX_OPCODES} opcodes, found more")
        value = self.pop()
        if self.stack or self.outer:
            self.refuse("expected one value at its end, found more")
        return value

    # --- the stack

    def push(self, value):
        self.stack.append(value)

    def pop(self):
        if not self.stack:
            self.refuse("takes a value from an empty stack")
        return self.stack.pop()

    def top(self):
        if not self.stack:
            self.refuse("looks at an empty stack")
        return self.stack[-1]

    def mark(self):
        self.outer.append(self.stack)
        self.stack = []

    def pop_mark(self):
        if not self.outer:
            self.refuse("takes arguments where none begin")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def pop_or_unmark(self):
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    # --- the memo

    def put(self, index):
        self.memo[index] = self.top()

    def get(self, index):
        if index not in self.memo:
            self.refuse(f"asks for the memo's entry {index}, which nothing filled")
        self.push(self.memo[index])

    # --- containers

    def tuple_of(self, count):
        if len(self.stack) < count:
            self.refuse(f"makes a tuple of {count} from {len(self.stack)} values")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def extend(self, items):
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            self.refuse(f"adds items to {kind_of(target)}")

    def update(self, items):
        target = self.top()
        if len(items) % 2:
            self.refuse("fills a dict with a key that has no value")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                self.check_key(key)
                target[key] = value
        elif not isinstance(target, Inert):
            self.refuse(f"sets items of {kind_of(target)}")

    def append(self):
        value = self.pop()
        self.extend([value])

    def set_item(self):
        value, key = self.pop(), self.pop()
        self.update([key, value])

    def make_dict(self):
        items = self.pop_mark()
        self.push({})
        self.update(items)

    def add_to_set(self):
        items = self.pop_mark()
        if not isinstance(self.top(), Inert):
            self.refuse(f"adds {len(items)} items to {kind_of(self.top())}")

    def make_frozen_set(self):
        self.pop_mark()
        self.push(Inert("frozenset"))

    def check_key(self, key):
        if not (key is None or isinstance(key, str) or (isinstance(key, int) and abs(key) < MAX_KEY)):
            self.refuse(f"expected text or a small integer as the key of a dict, found {kind_of(key)}")

    # --- globals, calls, state

    def add_global(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            self.refuse("expected the name of a global as text")
        try:
            found = self.find_global(module, name)
        except CheckpointError as error:
            self.refuse(str(error), "")
        if found is None:
            shown = f"{module}.{name}"
            shown = repr(shown if len(shown) <= 200 else shown[:200] + "...")
            self.refuse(
                f"asks for {shown}, which no file of tensors needs: this file can run code when pickle reads it",
                "Nothing of it was run. If you trust where it comes from, load it with torch and save its state_dict "
                "as safetensors; otherwise delete it.",
            )
        self.push(found)

    def stack_global(self):
        name, module = self.pop(), self.pop()
        self.add_global(module, name)

    def reduce(self):
        arguments, function = self.pop(), self.pop()
        self.call(function, arguments)

    def new_object(self):
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not function.is_class:
            self.refuse(f"makes an object of {kind_of(function)}")
        self.call(function, arguments)

    def call(self, function, arguments):
        if not isinstance(function, Global) or function.call is None or not isinstance(arguments, tuple):
            self.refuse(f"calls {kind_of(function)} with {kind_of(arguments)}")
        # One long list in the memo, handed to a thousand calls that each copy it, is a bomb.
        self.num_arguments += sum(len(item) for item in arguments if isinstance(item, (list, tuple, dict)))
        if self.num_arguments > MAX_OPCODES:
            self.refuse(f"expected at most {MAX_OPCODES} values in arguments, found more")
        try:
            self.push(function.call(*arguments))
        except TypeError as error:  # another number of arguments
            self.refuse(f"calls {function.name} with {len(arguments)} arguments ({error})")
        except CheckpointError as error:
            self.refuse(str(error), "")

    def build(self):
        self.pop()
        if not isinstance(self.top(), (Record, Inert)):
            self.refuse(f"sets the attributes of {kind_of(self.top())}")

    def persistent(self):
        try:
            self.push(self.load_persistent(self.pop()))
        except CheckpointError as error:
            self.refuse(str(error), "")

    def protocol(self):
        version = self.number(1)
        if not 2 <= version <= 5:
            self.refuse(f"expected protocol 2, 3, 4 or 5, found {version}")

    def frame(self):
        length = self.number(8)
        if length > self.end - self.position:
            self.refuse(f"a frame of {length} bytes, longer than the file")

    def long(self, size):
        length = self.number(size)
        if length > MAX_INT_BYTES:
            self.refuse(f"expected an integer of at most {MAX_INT_BYTES} bytes, found {length}")
        self.push(int.from_bytes(self.take(length), "little", signed=True))


_STOP = ord(".")
_STEPS: Mapping[int, Callable[[_Machine], None]] = {
    ord(code) if isinstance(code, str) else code: step
    for code, step in {
        0x80: _Machine.protocol,
        0x95: _Machine.frame,
        "(": _Machine.mark,
        "0": _Machine.pop_or_unmark,
        "1": _Machine.pop_mark,
        "N": lambda m: m.push(None),
        0x88: lambda m: m.push(True),
        0x89: lambda m: m.push(False),
        "J": lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
        "K": lambda m: m.push(m.number(1)),
        "M": lambda m: m.push(m.number(2)),
        0x8A: lambda m: m.long(1),
        0x8B: lambda m: m.long(4),
        "G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        "X": lambda m: m.push(m.text(4)),
        0x8C: lambda m: m.push(m.text(1)),
        0x8D: lambda m: m.push(m.text(8)),
        "U": lambda m: m.push(m.text(1)),  # text of Python 2
        "T": lambda m: m.push(m.text(4)),
        "B": lambda m: m.push(m.take(m.number(4))),
        "C": lambda m: m.push(m.take(m.number(1))),
        0x8E: lambda m: m.push(m.take(m.number(8))),
        0x96: lambda m: m.push(m.take(m.number(8))),
        "]": lambda m: m.push([]),
        "}": lambda m: m.push({}),
        ")": lambda m: m.push(()),
        0x8F: lambda m: m.push(Inert("set")),
        "l": lambda m: m.push(m.pop_mark()),
        "t": lambda m: m.push(tuple(m.pop_mark())),
        0x85: lambda m: m.tuple_of(1),
        0x86: lambda m: m.tuple_of(2),
        0x87: lambda m: m.tuple_of(3),
        "a": _Machine.append,
        "e": lambda m: m.extend(m.pop_mark()),
        "d": _Machine.make_dict,
        "s": _Machine.set_item,
        "u": lambda m: m.update(m.pop_mark()),
        0x90: _Machine.add_to_set,
        0x91: _Machine.make_frozen_set,
        "q": lambda m: m.put(m.number(1)),
        "r": lambda m: m.put(m.number(4)),
        0x94: lambda m: m.put(len(m.memo)),
        "h": lambda m: m.get(m.number(1)),
        "j": lambda m: m.get(m.number(4)),
        "c": lambda m: m.add_global(m.line(), m.line()),
        0x93: _Machine.stack_global,
        "R": _Machine.reduce,
        0x81: _Machine.new_object,
        "b": _Machine.build,
        "Q": _Machine.persistent,
    }.items()
}
