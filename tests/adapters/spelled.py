"""What adapters spell, and of whom: attributes, arguments and strings in the sources, with the objects they belong to.

A look at the syntax with just enough of types to tell tokred's own objects from a host's: annotations, constructors,
what functions of tokred return, fields of its classes. What cannot be told is a host's.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WINGS = ("tokred", "adapters", "kernels")
# Of torch and Python, by annotation; ``nn.Module``, ``Any`` and classes of hosts are whatever a host makes of them.
PLAIN = {
    "Tensor", "Path", "ast", "type", "Signature", "Parameter", "TorchFunctionMode", "Generator", "FlopCounterMode",
    "MethodType", "CodeType", "FunctionType", "ModuleType", "Mapping", "ndarray", *dir(builtins),
}  # fmt: skip
LISTS = {
    "list", "tuple", "Sequence", "Iterable", "Iterator", "set", "frozenset", "Container", "Collection", "WeakSet",
}  # fmt: skip
DICTS = {"dict", "Mapping", "MutableMapping", "defaultdict", "WeakKeyDictionary", "WeakValueDictionary"}
PART = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
PATH = re.compile(r"[A-Za-z_.0-9]+")


class Type(NamedTuple):
    """Of an expression: ``own`` (an object of a class of tokred's), ``class``, ``plain``, ``module``, ``of`` (holds
    ``inner``), ``each`` (a tuple of them), ``call`` (gives ``inner``)."""

    kind: str
    name: str = ""
    inner: Any = None


PLAINLY = Type("plain")


@dataclass
class Own:
    """A class of tokred's: its bases by name, what it defines, and the annotations of that."""

    bases: list[str]
    fields: dict[str, Any] = field(default_factory=dict)


class Later(NamedTuple):
    """What a method sets an attribute to: an expression, and the annotations of the method's arguments."""

    value: Any
    given: dict[str, Any]


class Imported(NamedTuple):
    """A name that comes from another module."""

    module: str
    name: str


class Use(NamedTuple):
    """One spelling; ``kind`` is attribute, read (by ``getattr`` and its like), argument, key, string or definition."""

    kind: str
    name: str
    line: int
    text: str


@functools.cache
def _trees() -> dict[Path, ast.Module]:
    found = (p for wing in WINGS for p in (ROOT / wing).rglob("*.py"))
    return {path: ast.parse(path.read_text("utf8")) for path in found}


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@functools.cache
def own_classes() -> dict[str, Own]:
    """All classes of the library by name, with what they define."""
    found: dict[str, Own] = {}
    for tree in _trees().values():
        for cls in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
            own = found.setdefault(cls.name, Own([]))
            own.bases += [_last(b.value if isinstance(b, ast.Subscript) else b) for b in cls.bases]
            for one in cls.body:
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                    own.fields[one.target.id] = one.annotation
                elif isinstance(one, ast.Assign):
                    own.fields |= {t.id: None for t in one.targets if isinstance(t, ast.Name)}
                elif isinstance(one, ast.FunctionDef):
                    own.fields[one.name] = one
                    own.fields |= {k: v for k, v in _set_on_self(one).items() if own.fields.get(k) is None}
    return found


def _starred(node: ast.Tuple) -> bool:
    """Whether a tuple has elements that are as many as something else has."""
    return any(isinstance(one, ast.Starred) for one in node.elts)


def _set_on_self(function: ast.FunctionDef) -> dict[str, Any]:
    """Attributes that a method sets, each with an annotation where there is one."""
    given = {a.arg: a.annotation for a in [*function.args.args, *function.args.kwonlyargs]}
    found: dict[str, Any] = {}
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, ast.Assign | ast.AnnAssign) else []:
            pairs = [(target, getattr(node, "value", None))]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) and not _starred(node.value):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            elif isinstance(target, ast.Tuple):
                pairs = [(one, None) for one in target.elts]
            for place, value in pairs:
                if isinstance(place, ast.Attribute) and _last(place.value) == "self":
                    known = getattr(node, "annotation", None)
                    if known is None and isinstance(value, ast.Name):
                        known = given.get(value.id)
                    found.setdefault(place.attr, known if known is not None else Later(value, given))
    return found


def defined(cls: str, name: str) -> tuple[str, Any] | None:
    """The class that defines ``name``, among ``cls`` and its bases in the library, and its annotation; None: none."""
    own = own_classes().get(cls)
    if own is None:
        return None
    if name in own.fields:
        return cls, own.fields[name]
    return next((found for base in own.bases if base != cls and (found := defined(base, name))), None)


def foreign(cls: str) -> bool:
    """True for a class of the library that has a host's among its bases."""
    own = own_classes().get(cls)
    if own is None:
        return cls in HOST_BASES
    return any(foreign(base) for base in own.bases if base != cls)


HOST_BASES = {"DynamicCache", "CacheLayerMixin", "Cache", "DynamicLayer"}


def _file(module: str) -> Path:
    """The file (or folder's ``__init__``) of a module of the library."""
    parts = module.split(".")[1:]
    path = ROOT.joinpath(*(parts if parts and parts[0] in WINGS else ["tokred", *parts]))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def globals_of(path: Path | None) -> dict[str, Any]:
    """Functions and constants of a module, or of all (None): their definitions, values, or (in a tuple) annotations."""
    found: dict[str, Any] = {}
    trees = _trees()
    for tree in trees.values() if path is None else [trees[path]] if path in trees else []:
        for one in tree.body:
            if isinstance(one, ast.FunctionDef):
                found[one.name] = one
            elif isinstance(one, ast.ImportFrom) and (one.module or "").startswith("tokred"):
                found |= {alias.asname or alias.name: Imported(one.module or "", alias.name) for alias in one.names}
            elif isinstance(one, ast.AnnAssign):
                found[_last(one.target)] = (one.annotation,)
            elif isinstance(one, ast.Assign):
                found |= {_last(target): one.value for target in one.targets}
    return found


@functools.cache
def _aliases() -> dict[str, ast.expr]:
    """Types that have a name, and bounds of type variables."""
    found: dict[str, ast.expr] = {}
    for tree in _trees().values():
        for one in tree.body:
            if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name):
                value, name = one.value, one.targets[0].id
                if isinstance(value, ast.Subscript | ast.BinOp):
                    found.setdefault(name, value)
                elif isinstance(value, ast.Call) and _last(value.func) == "TypeVar":
                    found |= {n: k.value for n, k in zip([name], value.keywords, strict=False) if k.arg == "bound"}
    return found


def annotated(node: Any, cls: str = "") -> Type | None:
    """What an annotation says; None: a host's, or anything."""
    if isinstance(node, ast.Constant):
        return annotated(ast.parse(node.value, mode="eval").body, cls) if isinstance(node.value, str) else PLAINLY
    if isinstance(node, ast.BinOp):
        sides = [annotated(side, cls) for side in (node.left, node.right)]
        if None in sides:
            return None
        return next((s for s in sides if s != PLAINLY), PLAINLY)
    if isinstance(node, ast.Subscript):
        base, inside = _last(node.value), node.slice
        parts = list(inside.elts) if isinstance(inside, ast.Tuple) else [inside]
        if base == "tuple" and not (len(parts) == 2 and getattr(parts[1], "value", 0) is ...):
            return Type("each", "", tuple(annotated(part, cls) for part in parts))
        if base in LISTS:
            return Type("of", "", annotated(parts[0], cls))
        if base in DICTS:
            return Type("of", "dict", annotated(parts[-1], cls))
        if base == "ref":
            return Type("call", "", annotated(parts[0], cls))
        if base == "Callable":
            return Type("call", "", annotated(parts[-1], cls))
        if base == "type":
            inner = annotated(parts[0], cls)
            return inner and Type("class", inner.name) if inner and inner.kind == "own" else None
        if base in ("ClassVar", "Annotated", "Final", "Literal"):
            return PLAINLY if base == "Literal" else annotated(parts[0], cls)
        return annotated(node.value, cls)
    name = _last(node) if isinstance(node, ast.AST) else ""
    if name == "Self":
        return Type("own", cls)
    if name in own_classes():
        return Type("own", name)
    if name in _aliases():
        return annotated(_aliases()[name], cls)
    text = ast.unparse(node) if isinstance(node, ast.AST) else ""
    if text.startswith(("torch.", "nn.")) and name != "Module":
        return PLAINLY
    return PLAINLY if name in PLAIN else None


class Look(ast.NodeVisitor):
    """Walks through one file with what is known of its names.

    Attributes:
        uses: names of hosts that the file spells, found on the way.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.scopes: list[dict[str, Type | None]] = [{}]
        self.classes: list[str] = []
        self.uses: list[Use] = []
        self.quiet = {
            id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
        }
        self.tree = tree
        self.asked: set[tuple[str, str]] = set()  # attributes whose values are being looked at
        self.around: dict[str, Any] = {}  # names of another module, while one of its constants is looked at
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.scopes[0] |= {(a.asname or a.name).partition(".")[0]: Type("module") for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.scopes[0][alias.asname or alias.name] = self._imported(node.module or "", alias.name)
        for one in tree.body:
            if isinstance(one, ast.ClassDef):
                self.scopes[0][one.name] = Type("class", one.name)
            elif isinstance(one, ast.FunctionDef):
                self.scopes[0][one.name] = Type("call", "", annotated(one.returns))

    def _imported(self, module: str, name: str) -> Type | None:
        if module.startswith("tokred"):
            if name in own_classes():
                return Type("class", name)
            known = globals_of(_file(module))
            return self.given(known[name], known) if name in known else Type("module", f"{module}.{name}")
        return PLAINLY if module.partition(".")[0] not in HOSTS else None

    def given(self, note: Any, around: dict[str, Any]) -> Type | None:
        """Type of a function or constant of a module of the library, whose other names are ``around``."""
        if isinstance(note, ast.FunctionDef):
            return Type("call", "", annotated(note.returns))
        if isinstance(note, Imported):
            return self._imported(*note)
        if isinstance(note, tuple):
            return annotated(note[0])
        held, self.scopes, self.around = (self.scopes, self.around), [{}], around
        found = self.of(note)
        self.scopes, self.around = held
        return found

    def known(self, name: str) -> Type | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        if name in own_classes():
            return Type("class", name)
        if name in self.around:
            return self.given(self.around[name], self.around)
        return PLAINLY if name in dir(builtins) else None

    def of(self, node: ast.AST | None) -> Type | None:
        """Type of an expression; None: a host's, as far as can be told."""
        method = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        return method(node) if method else None

    def _of_name(self, node: ast.Name) -> Type | None:
        return self.known(node.id)

    def _of_constant(self, node: ast.Constant) -> Type | None:
        return PLAINLY

    _of_joinedstr = _of_compare = _of_unaryop = _of_constant

    def _of_attribute(self, node: ast.Attribute) -> Type | None:
        owner = self.of(node.value)
        if owner is None or node.attr == "__dict__":
            return PLAINLY if node.attr == "__dict__" else None
        if owner.kind in ("own", "class"):
            found = defined(owner.name, node.attr)
            if found is None:
                return None if foreign(owner.name) else PLAINLY
            where, note = found
            if isinstance(note, ast.FunctionDef):
                is_field = any(_last(d) in ("property", "cached_property") for d in note.decorator_list)
                back = annotated(note.returns, owner.name)
                return back if is_field else Type("call", "", back)
            if isinstance(note, Later):
                if (where, node.attr) in self.asked:
                    return None  # it is set from itself, which tells nothing
                self.asked.add((where, node.attr))
                self.scopes.append(
                    {k: annotated(v, where) for k, v in note.given.items()} | {"self": Type("own", where)}
                )
                found = self.of(note.value)
                self.scopes.pop()
                self.asked.discard((where, node.attr))
                return found
            return annotated(note, where) if note is not None else PLAINLY
        if owner.kind == "module":
            if node.attr in own_classes():
                return Type("class", node.attr)
            known = globals_of(_file(owner.name)) if owner.name else {}
            if node.attr in known:
                return self.given(known[node.attr], known)
            return Type("module") if node.attr.islower() else PLAINLY
        if owner.kind == "of" and owner.name == "dict":
            inner = {"values": owner.inner, "items": Type("each", "", (PLAINLY, owner.inner)), "keys": PLAINLY}
            if node.attr in inner:
                return Type("call", "", Type("of", "", inner[node.attr]))
            if node.attr in ("get", "pop", "setdefault"):
                return Type("call", "", owner.inner)
        if owner.kind == "of" and node.attr in ("pop", "popleft"):
            return Type("call", "", owner.inner)
        return PLAINLY

    def _of_call(self, node: ast.Call) -> Type | None:
        name = _last(node.func)
        if isinstance(node.func, ast.Name) and name in self.BUILTINS:
            return self.BUILTINS[name](self, node.args)
        if name == "cast" and len(node.args) == 2:
            return annotated(node.args[0])
        if name == "replace" and node.args:
            return self.of(node.args[0])
        target = self.of(node.func)
        if isinstance(node.func, ast.Attribute) and name == "_replace":
            return self.of(node.func.value)
        if target is None:
            return None
        if target.kind == "class":
            return Type("own", target.name)
        if target.kind == "call":
            return target.inner
        return PLAINLY if target.kind in ("plain", "module") else None

    def _element(self, kind: Type | None, at: int | None = None) -> Type | None:
        if kind is None:
            return None
        if kind.kind == "each":
            if at is not None:
                return kind.inner[at] if at < len(kind.inner) else None
            return kind.inner[0] if len(set(kind.inner)) == 1 else None
        return kind.inner if kind.kind == "of" else PLAINLY if kind.kind == "plain" else None

    def _iterated(self, kind: Type | None) -> Type | None:
        return PLAINLY if kind and kind.kind == "of" and kind.name == "dict" else self._element(kind)

    BUILTINS: ClassVar[dict[str, Callable[..., Type | None]]] = {
        "next": lambda self, a: self._element(self.of(a[0])),
        "zip": lambda self, a: Type("of", "", Type("each", "", tuple(self._iterated(self.of(x)) for x in a))),
        "enumerate": lambda self, a: Type("of", "", Type("each", "", (PLAINLY, self._iterated(self.of(a[0]))))),
        **dict.fromkeys(
            ("list", "tuple", "sorted", "reversed", "set", "iter", "max", "min", "deepcopy"),
            lambda self, a: Type("of", "", self._iterated(self.of(a[0]))) if a else PLAINLY,
        ),
        "getattr": lambda self, a: None,
        "vars": lambda self, a: PLAINLY,
    }

    def _of_subscript(self, node: ast.Subscript) -> Type | None:
        kind, at = self.of(node.value), getattr(node.slice, "value", None)
        if isinstance(node.slice, ast.UnaryOp) and kind and kind.kind == "each":
            at = len(kind.inner) - node.slice.operand.value
        if kind and kind.kind == "of" and isinstance(node.slice, ast.Slice):
            return kind
        return self._element(kind, at if isinstance(at, int) else None)

    def _of_ifexp(self, node: ast.IfExp) -> Type | None:
        sides = [self.of(n) for n in (node.body, node.orelse) if getattr(n, "value", 0) is not None]
        return next((s for s in sides if s != PLAINLY), PLAINLY) if None not in sides else None

    def _of_boolop(self, node: ast.BoolOp) -> Type | None:
        sides = [self.of(value) for value in node.values]
        return next((s for s in sides if s != PLAINLY), PLAINLY) if None not in sides else None

    def _of_binop(self, node: ast.BinOp) -> Type | None:
        return self.of(node.left) or self.of(node.right)

    def _of_namedexpr(self, node: ast.NamedExpr) -> Type | None:
        return self.of(node.value)

    def _of_list(self, node: ast.List | ast.Tuple) -> Type | None:
        kinds = [self._element(self.of(e.value)) if isinstance(e, ast.Starred) else self.of(e) for e in node.elts]
        if isinstance(node, ast.Tuple) and not any(isinstance(e, ast.Starred) for e in node.elts):
            return Type("each", "", tuple(kinds))
        return Type("of", "", kinds[0] if kinds and len(set(kinds)) == 1 else None)

    _of_tuple = _of_set = _of_list

    def _of_dict(self, node: ast.Dict) -> Type | None:
        kinds = {
            self._element(self.of(v)) if k is None else self.of(v) for k, v in zip(node.keys, node.values, strict=True)
        }
        return Type("of", "dict", kinds.pop() if len(kinds) == 1 else PLAINLY if not kinds else None)

    def _of_listcomp(self, node: Any) -> Type | None:
        self._comprehend(node)
        inner = self.of(node.value if isinstance(node, ast.DictComp) else node.elt)
        self.scopes.pop()
        return Type("of", "dict" if isinstance(node, ast.DictComp) else "", inner)

    _of_generatorexp = _of_setcomp = _of_dictcomp = _of_listcomp

    def _comprehend(self, node: Any) -> None:
        self.scopes.append({})
        for one in node.generators:
            self.bind(one.target, self._iterated(self.of(one.iter)))
            for condition in one.ifs:
                self.narrow(condition)

    def bind(self, target: ast.AST, kind: Type | None) -> None:
        """Note what a name stands for."""
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = kind
        elif isinstance(target, ast.Starred):
            self.bind(target.value, Type("of", "", self._element(kind)))
        elif isinstance(target, ast.Tuple | ast.List):
            if kind and kind.kind == "own":
                fields = [v for v in own_classes()[kind.name].fields.values() if not isinstance(v, ast.FunctionDef)]
                kind = Type("each", "", tuple(annotated(v) for v in fields))
            for i, one in enumerate(target.elts):
                self.bind(one, self._element(kind, i) if kind and kind.kind == "each" else self._element(kind))

    def narrow(self, test: ast.AST) -> None:
        """Names that are asked to be of a class of tokred's are of it where it matters."""
        for node in ast.walk(test):
            if isinstance(node, ast.NamedExpr):
                self.bind(node.target, self.of(node.value))
            if isinstance(node, ast.Call) and _last(node.func) == "isinstance" and isinstance(node.args[0], ast.Name):
                kind = self.of(node.args[1])
                if kind and kind.kind == "class":
                    self.scopes[-1][node.args[0].id] = Type("own", kind.name)
                elif (said := annotated(node.args[1])) == PLAINLY:
                    self.scopes[-1][node.args[0].id] = said

    # ------------------------------------------------------------ walking

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes.append(node.name)
        if foreign(node.name):
            for one in node.body:
                if isinstance(one, ast.FunctionDef) and not one.name.startswith("__"):
                    self.uses.append(Use("definition", one.name, one.lineno, f"{node.name}.{one.name}"))
        self.generic_visit(node)
        self.classes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scopes[-1][node.name] = Type("call", "", annotated(node.returns))
        self._function(node, node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._function(node, [node.body])

    def _function(self, node: Any, body: list[Any]) -> None:
        cls = self.classes[-1] if self.classes else ""
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope: dict[str, Type | None] = {a.arg: annotated(a.annotation, cls) for a in args}
        if args and args[0].arg in ("self", "cls") and args[0].annotation is None and cls:
            scope[args[0].arg] = Type("own" if args[0].arg == "self" else "class", cls)
        for rest, name in ((node.args.vararg, ""), (node.args.kwarg, "dict")):
            if rest:
                scope[rest.arg] = Type("of", name, annotated(rest.annotation, cls))
        self.scopes.append(scope)
        for one in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
            self.visit(one)
        for one in body:
            self.visit(one)
        self.scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        kind = self.of(node.value)
        for target in node.targets:
            self.bind(target, kind)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        # An annotation names a type, which is none of a host's attributes.
        for one in (node.target, node.value):
            if one is not None:
                self.visit(one)
        self.bind(node.target, annotated(node.annotation, self.classes[-1] if self.classes else ""))

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.bind(node.target, self._iterated(self.of(node.iter)))
        for one in [*node.body, *node.orelse]:
            self.visit(one)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
            if item.optional_vars is not None:
                self.bind(item.optional_vars, self.of(item.context_expr) or PLAINLY)
        for one in node.body:
            self.visit(one)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self.scopes[-1][node.name] = PLAINLY
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self.narrow(node.test)
        for one in [*node.body, *node.orelse]:
            self.visit(one)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.narrow(node.test)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.narrow(node.test)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.narrow(node)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.bind(node.target, self.of(node.value))
        self.generic_visit(node)

    def visit_ListComp(self, node: Any) -> None:
        self._comprehend(node)
        self.generic_visit(node)
        self.scopes.pop()

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    # ------------------------------------------------------------ spellings

    def note(self, kind: str, name: str, node: Any) -> None:
        self.uses.append(Use(kind, name, node.lineno, ast.unparse(node)[:80]))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.of(node.value)
        own = owner is not None and owner.kind in ("own", "class")
        if owner is None or (own and foreign(owner.name) and defined(owner.name, node.attr) is None):
            self.note("attribute", node.attr, node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name, target = _last(node.func), self.of(node.func)
        if isinstance(node.func, ast.Attribute) and name in ("keys", "values", "items") and not node.args:
            self.visit(node.func.value)  # of a dictionary
        else:
            self.visit(node.func)
        for keyword in node.keywords:
            if keyword.arg and (target is None or target.kind == "of"):
                self.note("argument", keyword.arg, node)
        reads = name in ("getattr", "hasattr", "setattr", "delattr") and isinstance(node.func, ast.Name)
        among = isinstance(node.func, ast.Attribute) and name in ("get", "pop", "setdefault")
        first = node.args[1:2] if reads else node.args[:1] if among else []
        holder = node.args[0] if reads else node.func.value if among else None
        kind = self.of(holder)
        for key in first if kind is None or kind.kind == "of" else []:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                self.note("read" if reads else "key", key.value, key)
        for one in [*node.args, *(k.value for k in node.keywords)]:
            self.visit(one)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
            self.note("key", node.slice.value, node.slice)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        kind = self.of(node.comparators[0])
        among = isinstance(node.ops[0], ast.In | ast.NotIn) and (kind is None or kind.name == "dict")
        if among and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            self.note("key", node.left.value, node.left)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and id(node) not in self.quiet and PATH.fullmatch(node.value):
            for part in PART.findall(node.value):
                self.note("string", part, node)


HOSTS = {"timm", "transformers", "diffusers", "open_clip", "accelerate", "peft"}


def uses(path: Path) -> list[Use]:
    """Names of hosts that a file spells, as far as can be told."""
    return list(_uses(path))


def _uses(path: Path) -> Iterator[Use]:
    look = Look(ast.parse(path.read_text("utf8")))
    look.visit(look.tree)
    yield from look.uses
