"""Hostile files of torch.save: each is refused with one stable code, and nothing of it runs.

An audit hook sees what the interpreter is asked for while a file is read from memory (imports, compilation, processes, files, sockets …):
nothing at all may be. The payloads are live: a control hands some of them to Python's own unpickler and sees them run.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pickle_bytes import (
    STOP,
    Entry,
    Zip,
    archive,
    glob,
    number,
    ordered,
    proto,
    reduce,
    short,
    stack_global,
    state,
    storage,
    tensor,
    text,
    torch_file,
    tup,
    u,
)

from qformats.checkpoint import open_checkpoint
from qformats.containers import torch_zip as reader
from qformats.containers import unpickle as machine
from qformats.containers.source import MemorySource
from qformats.containers.torch_zip import flatten, open_torch_zip
from qformats.errors import BadFile, QFormatError, Unsafe, Unsupported

COMMAND = text("touch /tmp/qformats-was-run")
SYSTEM = glob("os", "system")
SEEN: list[str] = []
WATCH = [False]


def watch(event: str, args: object) -> None:
    if WATCH[0] and event != "builtins.id":
        SEEN.append(event)


sys.addaudithook(watch)


@contextmanager
def watched() -> Iterator[list[str]]:
    """The audit events of what runs inside."""
    SEEN.clear()
    WATCH[0] = True
    try:
        yield SEEN
    finally:
        WATCH[0] = False


def call(module: str, name: str, *args: bytes) -> bytes:
    return proto(reduce(glob(module, name), *args))


GLOBAL = "pickle-global"
# every way to a function of the system that scanners are known to have missed, or whose bypass was published
GADGETS = [
    "os:system", "posix:system", "nt:system", "os:popen", "os:execl", "os:spawnl", "os:posix_spawn", "os:remove", "subprocess:Popen",
    "subprocess:check_output", "subprocess:getoutput", "commands:getoutput", "builtins:eval", "builtins:exec", "builtins:getattr",
    "builtins:__import__", "builtins:compile", "builtins:open", "builtins:breakpoint", "builtins:help", "__builtin__:eval",
    "builtins:print", "builtins:map", "builtins:setattr", "importlib:import_module", "imp:load_source", "pkgutil:resolve_name",
    "pickle:loads", "_pickle:loads", "pickle:load", "dill:loads", "cloudpickle.cloudpickle:_make_function", "joblib:load",
    "marshal:loads", "shelve:open", "torch:load", "torch.serialization:load", "torch.jit:load", "torch.hub:load",
    "torch:ops.load_library", "torch._utils:_import_dotted_name", "torch.jit:_state", "torch._dynamo.guards:GuardBuilder.get",
    "torch.utils._config_module:ConfigModule.load_config", "torch.utils.bottleneck.__main__:run_cprofile",
    "torch.fx.experimental.symbolic_shapes:ShapeEnv", "torch.distributed.rpc:internal", "torch.testing._internal.common_utils:run_cmd",
    "torch.utils.collect_env:run", "torch.utils.data.datapipes.utils.decoder:basichandlers", "numpy:load",
    "numpy.f2py.crackfortran:param_eval", "numpy.testing._private.utils:runstring", "numpy.core.multiarray:_reconstruct",
    "runpy:run_path", "runpy:_run_code", "pty:spawn", "webbrowser:open", "operator:attrgetter", "_operator:methodcaller",
    "operator:itemgetter", "functools:partial", "functools:reduce", "itertools:starmap", "types:FunctionType", "types:CodeType",
    "code:InteractiveInterpreter.runcode", "codeop:compile_command", "collections:namedtuple", "collections:defaultdict",
    "copyreg:_reconstructor", "copyreg:add_extension", "timeit:timeit", "timeit:main", "cProfile:run", "profile:Profile.run",
    "trace:Trace.run", "pdb:run", "bdb:Bdb.run", "doctest:debug_script", "asyncio.unix_events:_UnixSubprocessTransport._start",
    "multiprocessing.util:spawnv_passfds", "ctypes:CDLL", "_ctypes:dlopen", "ensurepip:_run_pip", "pip:main",
    "idlelib.run:Executive.runcode", "idlelib.autocomplete:AutoComplete.get_entity", "idlelib.pyshell:ModifiedInterpreter.runcode",
    "lib2to3.pgen2.grammar:Grammar.loads", "venv:create", "zipimport:zipimporter.load_module", "socket:create_connection",
    "urllib.request:urlopen", "http.client:HTTPSConnection", "smtplib:SMTP", "shutil:rmtree", "pathlib:PosixPath", "_io:FileIO",
    "sys:exit", "sys:modules", "logging.config:_resolve", "logging:FileHandler", "distutils.file_util:write_file",
    "uuid:_get_command_stdout", "yaml:unsafe_load", "tensorflow.python.ops.io_ops:read_file", "keras.models:load_model",
    "transformers.dynamic_module_utils:get_class_in_module", "torchao.dtypes.affine_quantized_tensor:AffineQuantizedTensor",
    "signal:raise_signal", "torch:__dict__", "collections:OrderedDict.__init__.__globals__", "torch._C:_set_tensor_metadata",
    "torch.nn.modules.linear:Linear", "torch.storage:_load_from_bytes", "torch.storage:UntypedStorage.from_file",
    "torch.storage:TypedStorage._new_shared_filename_cpu", "torch.package:PackageImporter", "torch.utils.cpp_extension:load_inline",
    "torch._inductor.codecache:PyCodeCache.load", "torch.nn.modules.module:Module.__setstate__", "torch._tensor:Tensor.__setstate__",
    "torch._utils:_get_async_or_non_blocking", "torch.serialization:_legacy_load",
    "torch.distributed.elastic.multiprocessing:start_processes", "torch.multiprocessing.reductions:rebuild_storage_fd",
    "numpy._core.multiarray:_reconstruct", "numpy._core.multiarray:scalar", "numpy.core.multiarray:scalar", "numpy:ndarray", "numpy:dtype",
    "numpy.random._pickle:__generator_ctor", "numpy:memmap", "numpy.ctypeslib:load_library", "numpy.lib.npyio:NpzFile", "builtins:object",
    "builtins:type", "builtins:super", "builtins:globals", "builtins:delattr", "builtins:memoryview", "weakref:finalize",
    "contextlib:ExitStack", "atexit:register", "threading:Thread", "concurrent.futures:ThreadPoolExecutor", "sqlite3:connect",
    "site:addsitedir", "pydoc:locate", "pydoc:pipepager", "unittest.mock:_importer", "inspect:getattr_static", "gc:get_objects",
    "xmlrpc.client:ServerProxy", "ftplib:FTP", "telnetlib:Telnet", "tempfile:NamedTemporaryFile",
    "test.support.script_helper:run_python_until_end",
    "_frozen_importlib:BuiltinImporter.load_module", "_posixsubprocess:fork_exec", "_testcapi:run_in_subinterp",
    "_aix_support:_read_cmd_output", "_osx_support:_read_output", "_pyrepl.pager:pipe_pager", "imaplib:IMAP4_stream", "ssl:SSLContext",
    "sympy:sympify", "pandas:read_pickle",
    "pandas.core.computation.eval:eval", "scipy.io:loadmat", "jax:pure_callback", "onnx.hub:load", "sklearn.externals.joblib:load",
]  # fmt: skip
ODD_NAMES = {"a space": ("os ", "system"), "capitals": ("OS", "system"), "wide letters": ("\uff4f\uff53", "system"), "no name": ("", "")}

ALONE = {
    # ways of calling
    "INST": (proto(b"(" + COMMAND + b"ios\nsystem\n"), Unsafe, "pickle-opcode"),
    "OBJ": (proto(b"(" + SYSTEM + COMMAND + b"o"), Unsafe, GLOBAL),
    "OBJ of a dtype": (proto(b"(" + glob("torch", "float16") + COMMAND + b"o"), Unsafe, "pickle-opcode"),
    "NEWOBJ": (proto(glob("subprocess", "Popen") + tup(COMMAND) + b"\x81"), Unsafe, GLOBAL),
    "NEWOBJ of a function": (proto(glob("collections", "OrderedDict") + b")\x81"), Unsafe, "pickle-call"),
    "NEWOBJ_EX": (proto(stack_global("subprocess", "Popen") + b")}\x92", 4), Unsafe, GLOBAL),
    "NEWOBJ_EX without keywords": (proto(glob("torch", "Size") + b"))\x92", 4), Unsafe, "pickle-call"),
    "STACK_GLOBAL": (proto(reduce(stack_global("os", "system"), COMMAND), 4), Unsafe, GLOBAL),
    "STACK_GLOBAL from the memo": (
        proto(short("os") + b"\x94" + short("system") + b"\x94}h\x00h\x01\x93" + tup(COMMAND) + b"R", 4), Unsafe, GLOBAL),
    "STACK_GLOBAL of numbers": (proto(b"K\x01K\x02\x93", 4), BadFile, "pickle-value"),
    "STACK_GLOBAL of nothing": (proto(b"\x93", 4), BadFile, "pickle-stack"),
    "STACK_GLOBAL with dots": (proto(stack_global("collections", "OrderedDict.fromkeys"), 4), Unsafe, GLOBAL),
    "a global far behind": (proto(b"]" + b"K\x01a" * 5000 + reduce(SYSTEM, COMMAND) + b"a"), Unsafe, GLOBAL),
    "EXT1": (proto(b"\x82\x01" + tup(COMMAND) + b"R"), Unsafe, "pickle-extension"),
    "EXT2": (proto(b"\x83\x01\x01"), Unsafe, "pickle-extension"),
    "EXT4": (proto(b"\x84\x01\x01\x01\x01"), Unsafe, "pickle-extension"),
    "a call of a dtype": (call("torch", "float16", COMMAND), Unsafe, "pickle-call"),
    "a call of a storage class": (call("torch", "FloatStorage", number(1 << 30)), Unsafe, "pickle-call"),
    "a call of torch.Tensor": (call("torch", "Tensor", number(1 << 30)), Unsafe, "pickle-call"),
    "a call of a string": (proto(COMMAND + b")R"), Unsafe, "pickle-call"),
    "a call with a list": (proto(glob("collections", "OrderedDict") + b"]R"), Unsafe, "pickle-call"),
    "a call of what a call gave": (proto(ordered() + b")R"), Unsafe, "pickle-call"),
    "a pickle within": (proto(reduce(glob("pickle", "loads"), text("cos\nsystem\n(S'true'\ntR."))), Unsafe, GLOBAL),
    "a second pickle behind": (state(a=number(1)) + proto(reduce(SYSTEM, COMMAND)), Unsafe, "pickle-trailing"),
    "runs before it breaks": (proto(reduce(SYSTEM, COMMAND))[:-1] + b"\xff\xff\xff", Unsafe, GLOBAL),
    "popped, so it seems gone": (proto(reduce(SYSTEM, COMMAND) + b"0}"), Unsafe, GLOBAL),
    "POP": (proto(b"}}0"), Unsafe, "pickle-opcode"),
    "POP_MARK": (proto(b"}(}1"), Unsafe, "pickle-opcode"),
    "DUP": (proto(b"}2"), Unsafe, "pickle-opcode"),
    "a line without an end": (proto(b"c" + b"o" * 600), BadFile, "pickle-truncated"),
    "GLOBAL of an allowed function by dots, which is that function": (call("torch", "_utils._rebuild_tensor_v2"), BadFile, "pickle-value"),
    "GLOBAL of a method of an allowed class": (call("torch", "Size.__new__", COMMAND), Unsafe, GLOBAL),
    "GLOBAL through an allowed function": (call("torch._utils", "_rebuild_tensor_v2.__globals__"), Unsafe, GLOBAL),
    "GLOBAL through an allowed function to the system": (call("torch._utils", "torch.os.system", COMMAND), Unsafe, GLOBAL),
    "GLOBAL with a carriage return": (proto(b"cos\r\nsystem\r\n" + tup(COMMAND) + b"R"), Unsafe, GLOBAL),
    "GLOBAL of one line": (proto(b"cos\nsystem"), BadFile, "pickle-truncated"),
    "INST of an allowed class": (proto(b"(icollections\nOrderedDict\n"), Unsafe, "pickle-opcode"),
    "OBJ of an allowed class": (proto(b"(" + glob("collections", "OrderedDict") + b"o"), Unsafe, "pickle-opcode"),
    "NEWOBJ of a system's class through the memo": (proto(glob("os", "_wrap_close") + b"q\x00h\x00)\x81"), Unsafe, GLOBAL),
    "NEWOBJ_EX with keywords of code": (
        proto(stack_global("collections", "OrderedDict") + b")}" + text("a") + stack_global("os", "system") + b"s\x92", 4), Unsafe, GLOBAL),
    "STACK_GLOBAL from a long memo": (
        proto(short("os") + b"r\x00\x01\x00\x00" + short("system") + b"r\x01\x01\x00\x00"
              b"j\x00\x01\x00\x00j\x01\x01\x00\x00\x93", 4), Unsafe, GLOBAL),
    "STACK_GLOBAL of bytes": (proto(b"C\x02osC\x06system\x93", 4), BadFile, "pickle-value"),
    "STACK_GLOBAL of old strings": (proto(b"U\x02osU\x06system\x93", 4), Unsafe, "pickle-opcode"),
    "STACK_GLOBAL of a joined name": (proto(stack_global("torch._utils._rebuild_tensor_v2", ""), 4), Unsafe, GLOBAL),
    "STRING with escapes": (proto(b"S'\\x6f\\x73'\n"), Unsafe, "pickle-opcode"),
    "UNICODE with escapes": (proto(b"V\\u006fs\n"), Unsafe, "pickle-opcode"),
    "READONLY_BUFFER": (proto(b"\x98", 5), Unsafe, "pickle-opcode"),
    "EXT1 of zero": (proto(b"\x82\x00"), Unsafe, "pickle-extension"),
    "a pickle in bytes for torch to load": (
        call("torch.storage", "_load_from_bytes", b"B" + u(4, 27) + b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."), Unsafe, GLOBAL),
    "numpy's reconstruct and its state": (
        proto(reduce(glob("numpy.core.multiarray", "_reconstruct"), glob("numpy", "ndarray"), b"K\x00\x85", b"C\x01b") + b"}b", 3),
        Unsafe, GLOBAL),
    # state
    "BUILD of an ordered dict with __reduce__": (proto(ordered() + b"}" + text("__reduce__") + SYSTEM + b"sb"), Unsafe, GLOBAL),
    "BUILD of a dict with __setstate__": (proto(b"}}" + text("__setstate__") + SYSTEM + b"sb"), Unsafe, GLOBAL),
    "BUILD of a list": (proto(b"]}b"), Unsafe, "pickle-build"),
    "BUILD of a global": (proto(glob("collections", "OrderedDict") + b"}" + text("__init__") + b"K\x01sb"), Unsafe, "pickle-build"),
    "BUILD of a dtype's dict": (proto(glob("torch", "float16") + b"}" + text("__class__") + b"K\x01sb"), Unsafe, "pickle-build"),
    "BUILD of a tensor": (state(a=tensor() + b"}" + text("__class__") + b"K\x01sb"), Unsafe, "pickle-build"),
    "BUILD with a tuple of slots": (proto(ordered() + tup(b"}", b"}") + b"b"), Unsafe, "pickle-build"),
    "BUILD of a device twice": (proto(reduce(glob("torch", "device"), text("cpu")) + b"}b}b"), Unsafe, "pickle-build"),
    # persistent ids
    "PERSID": (proto(b"Pos.system\n"), Unsafe, "pickle-opcode"),
    "BINPERSID of a number": (proto(b"K\x01Q"), BadFile, "torch-storage"),
    "BINPERSID of text": (proto(text("storage") + b"Q"), BadFile, "torch-storage"),
    "BINPERSID of another kind": (proto(tup(text("module"), b"N", b"N", b"N", b"N") + b"Q"), BadFile, "torch-storage"),
    "BINPERSID without a class": (
        proto(tup(text("storage"), text("FloatStorage"), text("0"), b"N", number(6)) + b"Q"), BadFile, "torch-storage"),
    "BINPERSID with a list key": (
        proto(tup(text("storage"), glob("torch", "FloatStorage"), b"]", b"N", number(6)) + b"Q"), BadFile, "torch-storage"),
    "BINPERSID counted by True": (
        proto(tup(text("storage"), glob("torch", "FloatStorage"), text("0"), b"N", b"\x88") + b"Q"), BadFile, "torch-storage"),
    "BINPERSID of a dtype": (
        proto(tup(text("storage"), glob("torch", "float16"), text("0"), b"N", number(6)) + b"Q"), BadFile, "torch-storage"),
    "a storage that is not there": (state(a=tensor(storage(key="9"))), BadFile, "torch-storage"),
    "a storage that climbs": (state(a=tensor(storage(key="../data.pkl"))), BadFile, "torch-storage"),
    "a storage that is too short": (state(a=tensor(storage(count=7), size=(7,), stride=(1,))), BadFile, "torch-storage"),
    "a storage that is too long": (state(a=tensor(storage(count=4), size=(4,), stride=(1,))), BadFile, "torch-storage"),
    "a storage of negative size": (state(a=tensor(storage(count=-6))), BadFile, "torch-storage"),
    "a storage with two types": (state(a=tensor(), b=tensor(storage("IntStorage"))), BadFile, "torch-storage"),
    "a storage of quantized numbers": (state(a=tensor(storage("QInt8Storage", count=24))), Unsupported, "torch-dtype"),
    "a storage of complex128": (state(a=tensor(storage("ComplexDoubleStorage", count=1))), Unsupported, "torch-dtype"),
    "a storage of another module": (state(a=tensor(storage(module="os"))), Unsafe, GLOBAL),
    # tensors
    "an offset outside": (state(a=tensor(offset=1)), BadFile, "torch-shape"),
    "a negative offset": (state(a=tensor(offset=-1)), BadFile, "torch-shape"),
    "an offset of an empty tensor": (state(a=tensor(offset=7, size=(0,), stride=(1,))), BadFile, "torch-shape"),
    "a shape outside": (state(a=tensor(size=(3, 3))), BadFile, "torch-shape"),
    "a negative size": (state(a=tensor(size=(-2, 3))), BadFile, "torch-shape"),
    "two negative sizes": (state(a=tensor(size=(-2, -3))), BadFile, "torch-shape"),
    "a negative stride": (state(a=tensor(stride=(-3, 1))), BadFile, "torch-shape"),
    "a stride outside": (state(a=tensor(stride=(6, 1))), BadFile, "torch-shape"),
    "strides too few": (state(a=tensor(stride=(1,))), BadFile, "torch-shape"),
    "sizes that overflow": (state(a=tensor(size=(2**32, 2**32), stride=(0, 0))), BadFile, "torch-shape"),
    "strides of nothing: a bomb": (state(a=tensor(size=(2**40,), stride=(0,))), Unsupported, "torch-stride"),
    "strides that overlap": (state(a=tensor(size=(3, 3), stride=(1, 1))), Unsupported, "torch-stride"),
    "sizes as text": (
        state(a=glob("torch._utils", "_rebuild_tensor_v2") + tup(storage(), number(0), text("12"), text("12"), b"\x89", b"N") + b"R"),
                      BadFile, "torch-shape"),
    "65 dimensions": (state(a=tensor(size=(1,) * 65, stride=(1,) * 65)), BadFile, "torch-shape"),
    "too few arguments": (call("torch._utils", "_rebuild_tensor_v2", storage()), BadFile, "pickle-value"),
    "no arguments": (call("torch._utils", "_rebuild_tensor_v3"), BadFile, "pickle-value"),
    "a tensor of a dict": (
        call("torch._utils", "_rebuild_tensor", b"}", number(0), tup(number(1)), tup(number(1))), BadFile, "torch-storage"),
    "a tensor of dtype text": (call("torch._utils", "_rebuild_tensor_v3", storage(), number(0), tup(), tup(), b"\x89", b"N", text("int8")),
                               BadFile, "torch-shape"),
    "a tensor of dtype bits8": (
        call("torch._utils", "_rebuild_tensor_v3", storage(), number(0), tup(), tup(), b"\x89", b"N", glob("torch", "bits8")),
        Unsupported, "torch-dtype"),
    "a tensor with its conjugate bit": (state(a=tensor(more=b"}" + text("conj") + b"\x88s")), Unsupported, "torch-tensor"),
    "a tensor by way of numpy": (call("torch._utils", "_rebuild_device_tensor_from_numpy", b"N", b"N"), Unsupported, "torch-tensor"),
    "a sparse tensor": (call("torch._utils", "_rebuild_sparse_tensor", b"N", b"N"), Unsupported, "torch-tensor"),
    "a quantized tensor": (call("torch._utils", "_rebuild_qtensor", b"N", b"N"), Unsupported, "torch-tensor"),
    "a parameter of nothing": (call("torch._utils", "_rebuild_parameter", b"N", b"\x88", ordered()), BadFile, "pickle-value"),
    "a tensor of an evil class": (
        call("torch._tensor", "_rebuild_from_type_v2", glob("torch._utils", "_rebuild_tensor_v2"), SYSTEM, b")", b"}"),
                                  Unsafe, GLOBAL),
    "a tensor of a dtype's class": (
        call("torch._tensor", "_rebuild_from_type_v2", glob("torch._utils", "_rebuild_tensor"), glob("torch", "int8"),
             tup(storage(), number(0), tup(), tup()), b"}"), Unsafe, GLOBAL),
    "a tensor made by text": (call("torch._tensor", "_rebuild_from_type_v2", text("eval"), glob("torch", "Tensor"), b")", b"}"),
                              BadFile, "pickle-value"),
    "a tensor made by a dict": (
        call("torch._tensor", "_rebuild_from_type_v2", glob("collections", "OrderedDict"), glob("torch", "Tensor"), b")", b"}"),
        Unsafe, "pickle-call"),
    "a tensor made by itself": (
        call("torch._tensor", "_rebuild_from_type_v2", glob("torch._tensor", "_rebuild_from_type_v2"), glob("torch", "Tensor"), b")", b"}"),
        Unsafe, "pickle-call"),
    "a tensor of a type with a state of code": (
        call("torch._tensor", "_rebuild_from_type_v2", glob("torch._utils", "_rebuild_tensor_v2"), glob("torch", "Tensor"), b")",
             b"}" + text("__setstate__") + SYSTEM + b"s"), Unsafe, GLOBAL),
    "a tensor of a type that is made by loading": (
        call("torch._tensor", "_rebuild_from_type_v2", glob("torch", "load"), glob("torch", "Tensor"), tup(COMMAND), b"}"), Unsafe, GLOBAL),
    "a parameter with a state of code": (
        call("torch._utils", "_rebuild_parameter_with_state", b"N", b"\x88", ordered(), b"}" + text("a") + SYSTEM + b"s"), Unsafe, GLOBAL),
    "a wrapper of an unknown class": (
        call("torch._utils", "_rebuild_wrapper_subclass", glob("torch", "Tensor"), *[b"N"] * 7), Unsafe, GLOBAL),
    "a device of a list": (call("torch", "device", b"]"), BadFile, "pickle-value"),
    "a layout that is code": (call("torch.serialization", "_get_layout", text("__import__('os')")), BadFile, "pickle-value"),
    "an encoding with effects": (call("_codecs", "encode", text("a"), text("rot13")), BadFile, "pickle-value"),
    "bytes of wide characters": (call("_codecs", "encode", text("\u20ac"), text("latin1")), BadFile, "pickle-value"),
    "bytes by the gigabyte": (call("builtins", "bytes", number(1 << 30)), BadFile, "pickle-value"),
    "a bytearray by the gigabyte": (call("builtins", "bytearray", number(1 << 30)), BadFile, "pickle-value"),
    "a set of a text": (call("builtins", "set", text("abc")), BadFile, "pickle-value"),
    "an ordered dict of pairs": (call("collections", "OrderedDict", b"]"), BadFile, "pickle-value"),
    # structure
    "nothing": (b"", BadFile, "pickle-truncated"),
    "no protocol": (b"}.", BadFile, "pickle-value"),
    "protocol 0": (b"(dp0\n.", BadFile, "pickle-value"),
    "protocol 1": (proto(b"}", 1), Unsupported, "pickle-protocol"),
    "protocol 6": (proto(b"}", 6), Unsupported, "pickle-protocol"),
    "protocol 255": (proto(b"}", 255), Unsupported, "pickle-protocol"),
    "a second protocol": (proto(b"\x80\x02}"), Unsafe, "pickle-opcode"),
    "no STOP": (proto(b"}")[:-1], BadFile, "pickle-truncated"),
    "bytes after STOP": (proto(b"}") + b"\0", Unsafe, "pickle-trailing"),
    "STOP on nothing": (proto(b""), BadFile, "pickle-stack"),
    "STOP on two values": (proto(b"}}"), BadFile, "pickle-stack"),
    "STOP on a mark": (proto(b"}("), BadFile, "pickle-stack"),
    "underflow": (proto(b"}s"), BadFile, "pickle-stack"),
    "underflow below a mark": (proto(b"}(\x85"), BadFile, "pickle-stack"),
    "REDUCE of nothing": (proto(b"R"), BadFile, "pickle-stack"),
    "BUILD of nothing": (proto(b"b"), BadFile, "pickle-stack"),
    "TUPLE without a mark": (proto(b"t"), BadFile, "pickle-stack"),
    "a key without a value": (proto(b"}(" + text("a") + b"u"), BadFile, "pickle-stack"),
    "items for a list": (proto(b"]" + text("a") + b"K\x01s"), BadFile, "pickle-value"),
    "appended to a dict": (proto(b"}K\x01a"), BadFile, "pickle-value"),
    "a list as a key": (proto(b"}]K\x01s"), BadFile, "pickle-value"),
    "a tuple as a key": (proto(b"})K\x01s"), BadFile, "pickle-value"),
    "a key twice": (proto(b"}" + (text("a") + b"K\x01s") * 2), BadFile, "pickle-value"),
    "GET of nothing": (proto(b"h\x00"), BadFile, "pickle-memo"),
    "LONG_BINGET of nothing": (proto(b"j\xff\xff\xff\xff"), BadFile, "pickle-memo"),
    "a memo overwritten": (proto(b"}q\x00" + reduce(glob("collections", "OrderedDict")) + b"q\x00"), BadFile, "pickle-memo"),
    "MEMOIZE over BINPUT": (proto(b"}q\x01\x94", 4), BadFile, "pickle-memo"),
    "MEMOIZE of nothing": (proto(b"\x94", 4), BadFile, "pickle-stack"),
    "MEMOIZE of a mark": (proto(b"}(\x94", 4), BadFile, "pickle-stack"),
    "an unknown opcode": (proto(b"\xf0"), BadFile, "pickle-value"),
    "a cut number": (b"\x80\x02J\x01", BadFile, "pickle-truncated"),
    "a cut text": (b"\x80\x02X\x08\x00\x00\x00ab", BadFile, "pickle-truncated"),
    "a cut float": (b"\x80\x02G\x01", BadFile, "pickle-truncated"),
    "text that is not UTF-8": (proto(b"X\x02\x00\x00\x00\xff\xfe"), BadFile, "pickle-value"),
    "text of a lone surrogate": (proto(b"X\x03\x00\x00\x00\xed\xa0\x80"), BadFile, "pickle-value"),
    "a text of 2^63 bytes": (proto(b"\x8d" + u(8, 1 << 63), 4), Unsafe, "pickle-limit"),
    "bytes of 4 GiB": (proto(b"B" + u(4, 0xFFFFFFFF), 3), Unsafe, "pickle-limit"),
    "a bytearray of 2^62": (proto(b"\x96" + u(8, 1 << 62), 5), Unsafe, "pickle-limit"),
    "a frame beyond the end": (proto(b"\x95" + u(8, 99) + b"}", 4), BadFile, "pickle-truncated"),
    "NEXT_BUFFER": (proto(b"\x97", 5), Unsafe, "pickle-opcode"),
    "LONG4 of 2 GiB": (proto(b"\x8b" + u(4, 0x7FFFFFFF)), Unsafe, "pickle-limit"),
    "LONG1 of 255 bytes": (proto(b"\x8a\xff" + b"\x7f" * 255), Unsafe, "pickle-limit"),
    "LONG of 65 bits": (proto(b"\x8a\x09" + b"\xff" * 8 + b"\x7f"), Unsafe, "pickle-limit"),
    "text integers": (proto(b"I" + b"9" * 5000 + b"\n"), Unsafe, "pickle-opcode"),
    "a list in itself": (proto(b"]q\x00h\x00a"), Unsafe, "pickle-cycle"),
    "a dict in itself": (proto(b"}q\x00" + text("a") + b"h\x00s"), Unsafe, "pickle-cycle"),
    "a list in itself by a tuple": (proto(b"]q\x00h\x00\x85a"), Unsafe, "pickle-cycle"),
    "lists 100000 deep": (proto(b"]" * 100_000 + b"a" * 99_999), Unsafe, "pickle-limit"),
    "tuples 100000 deep": (proto(b")" + b"\x85" * 100_000), Unsafe, "pickle-limit"),
    "laughs in lists": (proto(b"]q\x00" + b"".join(b"0]q" + u(1, n + 1) + b"(" + (b"h" + u(1, n)) * 9 + b"e" for n in range(40))),
                        Unsafe, "pickle-opcode"),
    "laughs in tuples": (proto(b")q\x00" + b"".join(b"h" + u(1, n) + b"\x86q" + u(1, n + 1) for n in range(60))), Unsafe, "pickle-limit"),
}  # fmt: skip
ALONE.update({f"global {name}": (call(*name.split(":"), COMMAND), Unsafe, GLOBAL) for name in GADGETS})
ALONE.update({f"global with {name}": (call(*words, COMMAND), Unsafe, GLOBAL) for name, words in ODD_NAMES.items()})

GOOD = state(a=tensor())


def put(place: int, data: bytes, raw: bytes) -> bytes:
    return data[:place] + raw + data[place + len(raw) :]


def entries(*changes: Entry, base: bytes = GOOD) -> Zip:
    return archive(base, more=list(changes))


def first(**changes: object) -> bytes:
    found = archive(GOOD)
    for key, value in changes.items():
        setattr(found.entries[0], key, value)
    return found.build()


def whole(**changes: object) -> bytes:
    found = archive(GOOD)
    for key, value in changes.items():
        setattr(found, key, value)
    return found.build()


def legacy() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


EVIL = proto(reduce(SYSTEM, COMMAND))
ZIPS = {
    "an empty file": (b"", BadFile, "not-a-zip"),
    "four bytes": (b"PK\x03\x04", BadFile, "not-a-zip"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", BadFile, "not-a-zip"),
    "an empty zip": (whole(entries=[], wide=False), BadFile, "torch-archive"),
    "a legacy file": (legacy(), Unsupported, "torch-legacy"),
    "a bare pickle that runs": (EVIL, Unsupported, "torch-legacy"),
    "a tar": (bytes(257) + b"ustar\x0000" + bytes(300), Unsupported, "torch-legacy"),
    "7z, which some loaders unpack": (b"7z\xbc\xaf'\x1c" + bytes(100), Unsupported, "torch-legacy"),
    "gzip": (b"\x1f\x8b" + bytes(100), Unsupported, "torch-legacy"),
    "a damaged magic that scanners skip": (b"QK" + torch_file(EVIL)[2:], BadFile, "not-a-zip"),
    "junk in front": (b"MZ" + torch_file(EVIL), BadFile, "not-a-zip"),
    "a zip in front": (torch_file(GOOD) + torch_file(EVIL), BadFile, "zip-end"),
    "junk in front that offsets know": (whole(before=b"PK\x03\x04" + bytes(60)), Unsafe, "zip-hidden-bytes"),
    "junk behind": (whole(after=b"\0"), BadFile, "zip-end"),
    "a comment": (whole(comment=b"hello"), BadFile, "zip-end"),
    "a comment that is a zip": (whole(comment=torch_file(EVIL)), BadFile, "zip-end"),
    "cut in the directory": (torch_file(GOOD)[:-30], BadFile, "zip-end"),
    "cut in the data": (torch_file(GOOD)[:200], BadFile, "zip-end"),
    "two data.pkl": (entries(Entry(b"archive/data.pkl", EVIL)).build(), BadFile, "zip-duplicate"),
    "two data.pkl by case": (entries(Entry(b"archive/DATA.pkl", EVIL)).build(), BadFile, "zip-duplicate"),
    "a storage twice": (entries(Entry(b"archive/data/0", bytes(24))).build(), BadFile, "zip-duplicate"),
    "a storage twice by case": (entries(Entry(b"archive/Data/0", bytes(24))).build(), BadFile, "zip-duplicate"),
    "a pickle beside the storages": (entries(Entry(b"archive/data/0.pkl", EVIL)).build(), BadFile, "torch-archive"),
    "data.pkl in two folders": (entries(Entry(b"other/data.pkl", EVIL)).build(), BadFile, "torch-archive"),
    "a second pickle": (entries(Entry(b"archive/data2.pkl", EVIL)).build(), BadFile, "torch-archive"),
    "no data.pkl": (Zip([Entry(b"archive/version", b"3")]).build(), BadFile, "torch-archive"),
    "TorchScript": (entries(Entry(b"archive/constants.pkl", EVIL)).build(), Unsupported, "torch-script"),
    "TorchScript by its code": (entries(Entry(b"archive/code/__torch__.py", b"x")).build(), Unsupported, "torch-script"),
    "a name that climbs": (entries(Entry(b"archive/../../etc/passwd")).build(), Unsafe, "zip-name"),
    "a name that climbs backwards": (entries(Entry(b"archive\\..\\..\\x")).build(), Unsafe, "zip-name"),
    "a name that stays": (entries(Entry(b"archive/./data/1")).build(), Unsafe, "zip-name"),
    "a name with two slashes": (entries(Entry(b"archive//data/1")).build(), Unsafe, "zip-name"),
    "an absolute name": (entries(Entry(b"/etc/passwd")).build(), Unsafe, "zip-name"),
    "a name with a drive": (entries(Entry(b"archive/C:\\x")).build(), Unsafe, "zip-name"),
    "a name with a zero byte": (entries(Entry(b"archive/a\0b")).build(), Unsafe, "zip-name"),
    "a name of nothing": (entries(Entry(b"")).build(), Unsafe, "zip-name"),
    "a directory": (entries(Entry(b"archive/dir/")).build(), Unsafe, "zip-name"),
    "a name that is not UTF-8": (entries(Entry(b"archive/\xff\xfe")).build(), Unsafe, "zip-name"),
    "a name turned round": (entries(Entry("archive/\u202elkp.atad".encode())).build(), Unsafe, "zip-name"),
    "a name without end": (entries(Entry(b"archive/" + b"a" * 2000)).build(), Unsafe, "zip-name"),
    "another name in the header": (first(local_name=b"archive/evil.pkl"), BadFile, "zip-entry"),
    "another size in the header": (first(local_said=3), BadFile, "zip-entry"),
    "a size beyond the end": (first(said=1 << 30, local_said=1 << 30), BadFile, "zip-entry"),
    "packed and unpacked sizes differ": (first(packed=5), BadFile, "zip-entry"),
    "a size too small": (first(said=20, local_said=20), Unsafe, "zip-hidden-bytes"),
    "an offset into another entry": (first(offset=130), Unsafe, "zip-hidden-bytes"),
    "an offset outside": (entries(Entry(b"archive/x", offset=1 << 30)).build(), Unsafe, "zip-hidden-bytes"),
    "two entries in one place": (
        Zip([Entry(b"archive/data.pkl", GOOD), Entry(b"archive/data/0", b"", offset=0)]).build(), BadFile, "zip-overlap"),
    "encrypted": (first(flags=0x0801), Unsupported, "zip-encrypted"),
    "strongly encrypted": (first(flags=0x0841), Unsupported, "zip-encrypted"),
    "a masked header": (first(flags=0x2800), Unsupported, "zip-encrypted"),
    "patched data": (first(flags=0x0820), Unsupported, "zip-encrypted"),
    "deflated": (first(method=8), Unsupported, "zip-compressed"),
    "a bomb: deflated, 4 GiB of zeros": (first(method=8, said=0xFFFFFFFE, packed=100), Unsupported, "zip-compressed"),
    "bzip2": (first(method=12), Unsupported, "zip-compressed"),
    "hidden bytes between entries": (entries(Entry(b"archive/x", b"y", before=bytes(300))).build(), Unsafe, "zip-hidden-bytes"),
    "an entry's comment": (entries(Entry(b"archive/x", comment=b"c")).build(), BadFile, "zip-directory"),
    "64-bit sizes that are missing": (entries(Entry(b"archive/x", said=0xFFFFFFFF, packed=0xFFFFFFFF)).build(), BadFile, "zip-entry"),
    "64-bit sizes that lie": (
        entries(Entry(b"archive/x", said=0xFFFFFFFF, packed=0xFFFFFFFF, extra=struct.pack("<2H2Q", 1, 16, 1 << 62, 1 << 62))).build(),
        BadFile, "zip-entry"),
    "64-bit sizes twice": (entries(Entry(b"archive/x", extra=struct.pack("<2HQ", 1, 8, 0))).build(), BadFile, "zip-entry"),
    "a damaged extra field": (entries(Entry(b"archive/x", extra=b"\x01\x00\xff\xff")).build(), BadFile, "zip-entry"),
    "64-bit sizes where none are needed": (
        entries(Entry(b"archive/x", extra=struct.pack("<2H2Q", 1, 16, 1 << 62, 1 << 62))).build(), BadFile, "zip-entry"),
    "a 64-bit offset that lies": (
        entries(Entry(b"archive/x", offset=0xFFFFFFFF, extra=struct.pack("<2HQ", 1, 8, 1 << 60))).build(), Unsafe, "zip-hidden-bytes"),
    "a zip64 locator outside": (whole(locator=1 << 60), BadFile, "zip-end"),
    "a zip64 count that lies": (whole(count64=1 << 40), BadFile, "zip-end"),
    "a zip64 count of 2^40 entries": (whole(count64=1 << 40, count=0xFFFF), Unsafe, "zip-limit"),
    "a zip64 start that lies": (whole(start64=0, start=0xFFFFFFFF), BadFile, "zip-end"),
    "a zip64 locator that lies": (whole(locator=0), BadFile, "zip-end"),
    "a zip64 record that is missing": (whole(wide=False, count=0xFFFF), BadFile, "zip-end"),
    "too many entries said": (whole(wide=False, count=100), BadFile, "zip-directory"),
    "too few entries said": (whole(wide=False, count=1), BadFile, "zip-directory"),
    "a directory elsewhere": (whole(wide=False, start=10), BadFile, "zip-end"),
    "big-endian": (torch_file(GOOD, byteorder=b"big"), Unsupported, "torch-byteorder"),
    "a byte order of its own": (torch_file(GOOD, byteorder=b"middle"), BadFile, "torch-archive"),
}  # fmt: skip


def read(data: bytes) -> None:
    found = flatten(open_torch_zip(MemorySource(data)).value)
    for raw in found.values():
        assert len(raw.read()) == raw.nbytes


def refused(data: bytes, kind: type[QFormatError], code: str) -> None:
    with pytest.raises(QFormatError) as caught, watched() as events:
        read(data)
    assert events == []
    assert (type(caught.value), caught.value.code) == (kind, code), caught.value
    assert len(str(caught.value)) < 3000 and str(caught.value).isprintable()


def test_the_base_of_all_cases_is_right() -> None:
    (raw,) = flatten(open_torch_zip(MemorySource(torch_file(GOOD))).value).values()
    assert (raw.name, raw.dtype, raw.shape, raw.read()) == ("a", "F32", (2, 3), struct.pack("<6f", *range(6)))
    loaded = torch.load(io.BytesIO(torch_file(GOOD)), weights_only=True)
    assert torch.equal(loaded["a"], torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("name", ALONE)
def test_a_hostile_pickle_is_refused_and_nothing_runs(name: str) -> None:
    pickled, kind, code = ALONE[name]
    refused(torch_file(pickled), kind, code)


@pytest.mark.parametrize("name", ZIPS)
def test_a_hostile_archive_is_refused_and_nothing_runs(name: str) -> None:
    refused(*ZIPS[name])


def test_a_pickle_among_numbers_or_in_an_entry_of_no_meaning_is_not_looked_at() -> None:
    data = EVIL.ljust(64, b"\0")
    pickled = state(a=tensor(storage("ByteStorage", count=64), size=(64,), stride=(1,)))
    file = torch_file(pickled, storages={"0": data}, more=[Entry(b"archive/inner.zip", torch_file(EVIL))])
    with watched() as events:
        (raw,) = flatten(open_torch_zip(MemorySource(file)).value).values()
        assert raw.read() == data
    assert events == []


def test_the_payloads_are_live_and_the_hook_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(os, "system", lambda command: ran.append(command) or 0)
    for name in ("global os:system", "STACK_GLOBAL", "a global far behind", "runs before it breaks", "popped, so it seems gone", "INST"):
        with watched() as events, suppress(pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError):
            pickle.loads(ALONE[name][0])
        assert "pickle.find_class" in events, name
    assert ran == ["touch /tmp/qformats-was-run"] * 6


def test_nothing_of_a_hostile_checkpoint_runs_through_the_whole_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentinel = tmp_path / "ran"
    monkeypatch.setattr(os, "system", lambda *_: sentinel.touch())
    (tmp_path / "pytorch_model.bin").write_bytes(torch_file(proto(reduce(SYSTEM, text(f"touch {sentinel}")))))
    with pytest.raises(Unsafe) as without:
        open_checkpoint(tmp_path)
    with pytest.raises(Unsafe) as caught:
        open_checkpoint(tmp_path, allow_pickle=True)
    assert (without.value.code, caught.value.code) == ("pickle", GLOBAL)
    assert "--allow-pickle" in str(without.value) and "os.system" in str(caught.value)
    assert not sentinel.exists()


BOMBS = {
    "marks": b"(" * 3000, "lists": b"]" * 3000, "constants": b"N" * 9000, "memo": b"}" + b"\x94" * 3000,
    "pairs": b")q\x00" + b"h\x00h\x00\x86" * 3000, "texts": short("a") * 3000, "calls": (glob("collections", "OrderedDict") + b")R") * 3000,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_operations_objects_and_memo_are_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, value in (("MAX_OPERATIONS", 8000), ("MAX_OBJECTS", 1000), ("MAX_MEMO", 1000)):
        assert getattr(machine, limit) <= 1 << 24
        monkeypatch.setattr(machine, limit, value)
    refused(torch_file(proto(BOMBS[name], 4)), Unsafe, "pickle-limit")


def test_a_pickle_of_a_gigabyte_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_PICKLE_NBYTES", 100)
    refused(torch_file(GOOD), Unsafe, "pickle-limit")


VALID = [
    torch_file(state(a=tensor(), b=tensor(size=(3, 2), stride=(1, 3)), c=number(3), d=ordered() + b"}" + text("_metadata") + b"}sb")),
    torch_file(state(a=tensor(offset=2, size=(2, 2), stride=(2, 1)), b=b"](K\x01K\x02e", c=glob("torch", "float16"))),
]
damage = st.lists(st.tuples(st.integers(0, 1 << 16), st.sampled_from(["flip", "byte", "opcode", "drop", "copy"]), st.integers(0, 255)),
                  min_size=1, max_size=5)  # fmt: skip
OPCODES = b"(.0122FIJKLMNPQRSTUVXabcdeghijloprqtu})]\x80\x81\x82\x85\x86\x87\x88\x8a\x8b\x8c\x8e\x8f\x90\x91\x92\x93\x94\x95\x96"


def damaged(data: bytes, steps: list[tuple[int, str, int]], start: int, stop: int) -> bytes:
    out = bytearray(data[start:stop])
    for place, kind, value in steps:
        at = place % max(1, len(out))
        if kind == "flip":
            out[at] ^= 1 << value % 8
        elif kind == "byte":
            out[at] = value
        elif kind == "opcode":
            out[at] = OPCODES[value % len(OPCODES)]
        elif kind == "drop":
            del out[at : at + 1 + value % 4]
        else:
            out[at:at] = out[at : at + value % 16]
        if not out:
            break
    return data[:start] + bytes(out) + data[stop:]


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(VALID), damage)
def test_a_damaged_pickle_is_an_error_of_ours_or_a_value(data: bytes, steps: list[tuple[int, str, int]]) -> None:
    begin = data.index(b"\x80\x02")
    pickled = damaged(data, steps, begin, data.index(STOP + b"PK", begin) + 1)[begin : -(len(data) - data.index(STOP + b"PK", begin) - 1)]
    with suppress(QFormatError):
        read(torch_file(pickled))


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(VALID), damage)
def test_a_damaged_archive_is_an_error_of_ours_or_a_value(data: bytes, steps: list[tuple[int, str, int]]) -> None:
    with suppress(QFormatError):
        read(damaged(data, steps, 0, len(data)))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([bytes([code]) for code in OPCODES] + [number(3), text("a"), tensor(), ordered(), b"h\x00", b"q\x00"]), max_size=30
    )
)
def test_random_opcodes_are_an_error_of_ours_or_a_value(body: list[bytes]) -> None:
    with suppress(QFormatError):
        read(torch_file(proto(b"".join(body), 4)))


def test_every_cut_and_every_flipped_bit_of_a_pickle() -> None:
    for at in range(len(GOOD)):
        with pytest.raises(QFormatError):
            read(torch_file(GOOD[:at]))
        for bit in range(8):
            with suppress(QFormatError):
                read(torch_file(put(at, GOOD, bytes([GOOD[at] ^ 1 << bit]))))
