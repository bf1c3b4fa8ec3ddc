"""Where each component of each layer is in a model: module path, which tensor of it, width."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel

from capture.errors import ModelError, RequestError
from capture.families import ATTENTION_NAMES, MLP_NAMES, Columns, Family, family_of
from datastore.schema import COMPONENTS, DTYPES, ComponentSpec

_CURE = "name the module yourself, as in --hook-path residual=model.blocks.{layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """One tensor of one layer.

    Attributes
    ----------
    path : str
        Module path from the model that was searched, as `model.get_submodule` takes it.
    take : "output" or "input"
        The module's output or its first argument; of a tuple the first element.
    width : int
        Size of the last axis, after `columns`.
    columns : Columns, optional
        Which columns of the tensor; all where None.
    """

    component: str
    layer: int
    path: str
    width: int
    take: Literal["output", "input"] = "output"
    columns: Columns | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ComponentTable:
    """What a model offers, and why it does not offer the rest.

    Attributes
    ----------
    model_type, family : str
        `config.model_type` and the row of the table of families; the family is empty where structure alone was used.
    decoder, blocks : str
        Paths of the text decoder and of its list of blocks in the model; the decoder's is empty where it is the model.
    n_layers, hidden : int
    vocab_size : int or None
        Rows of the embedding.
    dtype : str
        In which the model computes, and so what is stored.
    hooks, absent : mapping
        For each (component, layer) its hook, or the sentence that says why there is none.
    """

    model_type: str
    family: str
    decoder: str
    blocks: str
    n_layers: int
    hidden: int
    vocab_size: int | None
    dtype: str
    hooks: Mapping[tuple[str, int], Hook]
    absent: Mapping[tuple[str, int], str]

    @property
    def components(self) -> tuple[str, ...]:
        """Components that at least one layer has, in the vocabulary's order."""
        there = {component for component, _ in self.hooks}
        return tuple(component for component in COMPONENTS if component in there)

    def hook(self, component: str, layer: int) -> Hook:
        """Hook of one tensor.

        Raises
        ------
        RequestError
            Where the model has no such component or layer; the message says why.
        """
        if (component, layer) in self.hooks:
            return self.hooks[component, layer]
        if component not in COMPONENTS:
            raise RequestError(f"{component!r} is not a component; they are {', '.join(COMPONENTS)}")
        if not 0 <= layer < self.n_layers:
            raise RequestError(f"{self.model_type} has no layer {layer}; its layers are 0 to {self.n_layers - 1}")
        raise RequestError(self.absent[component, layer])

    def specs(self, components: Sequence[str], layers: Iterable[int]) -> tuple[ComponentSpec, ...]:
        """Components as a plan records them: width, dtype and hook path with `{layer}` for the number.

        Raises
        ------
        RequestError
            Where one does not exist on one of the layers, or has not one width on all of them.
        """
        return tuple(self._spec(component, tuple(layers)) for component in components)

    def _spec(self, component: str, layers: tuple[int, ...]) -> ComponentSpec:
        hooks = [self.hook(component, layer) for layer in layers]
        widths = {hook.width: hook.layer for hook in reversed(hooks)}
        if len(widths) != 1:
            raise RequestError(
                f"{component} of {self.model_type} is "
                f"{' and '.join(f'{w} wide on layer {n}' for w, n in widths.items())}, "
                "and one array has one width; capture those layers separately"
            )
        return ComponentSpec(name=component, width=hooks[0].width, dtype=self.dtype, hook=_template(hooks[0]))


def find_components(model: nn.Module, *, hook_paths: Mapping[str, str] | None = None) -> ComponentTable:
    """Find the components of a model by its family's row, or by structure where no row names its type.

    Parameters
    ----------
    model : nn.Module
        A base model, a model with a head, a multimodal or a PEFT wrapper.
    hook_paths : mapping, optional
        Component to module path with `{layer}` for the layer number, in place of what would be found; `:input` at the
        end takes the module's first argument and not its output.

    Raises
    ------
    ModelError
        Where no list of decoder blocks is found and no hook path says where it is.
    RequestError
        Where a hook path names no module.
    """
    paths = {component: _resolved(model, component, path) for component, path in (hook_paths or {}).items()}
    decoder = text_decoder(model)
    config = getattr(decoder, "config", None)
    family = family_of(getattr(config, "model_type", ""))
    blocks_path, blocks = _find_blocks(model, decoder, family, hook_paths=paths)
    embedding = _embedding(decoder)
    site = _Site(
        model=model,
        blocks_path=blocks_path,
        model_type=getattr(config, "model_type", "") or type(decoder).__name__,
        family=family,
        config=config,
        hidden=_hidden(config, embedding),
        hook_paths=paths,
    )
    found = {(c, i): site.locate(c, i, block) for c in COMPONENTS for i, block in enumerate(blocks)}
    return ComponentTable(
        model_type=site.model_type,
        family=family.name if family else "",
        decoder=_name_of(model, decoder),
        blocks=blocks_path,
        n_layers=len(blocks),
        hidden=site.hidden,
        vocab_size=embedding.num_embeddings if embedding else None,
        dtype=_dtype_name(embedding, decoder),
        hooks={key: hook for key, hook in found.items() if isinstance(hook, Hook)},
        absent={key: why for key, why in found.items() if isinstance(why, str)},
    )


def describe_components(
    config: Any,
    *,
    dtype: str | None = None,
    hook_paths: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> ComponentTable:
    """Find the components from the config alone: the same table, from a model on the meta device, without weights."""
    make: Any = AutoModel
    with torch.device("meta"):
        model = make.from_config(config, trust_remote_code=trust_remote_code)
    table = find_components(model, hook_paths=hook_paths)
    return replace(table, dtype=dtype) if dtype else table


def text_decoder(model: nn.Module) -> nn.Module:
    """The part of a model that runs the decoder blocks over token ids: no head, no vision tower, no adapter wrapper.

    Raises
    ------
    ModelError
        For an adapter that does more than replace modules inside the model (prompt tuning and its like).
    """
    wrapper: Any = model
    if hasattr(wrapper, "peft_config") and hasattr(wrapper, "get_base_model"):
        for name, adapter in wrapper.peft_config.items():
            if getattr(adapter, "is_prompt_learning", False):
                raise ModelError(
                    f"adapter {name!r} ({type(adapter).__name__}) adds tokens of its own to the prompt, so "
                    "rows would "
                    "not match token ids; capture the model without it"
                )
        return text_decoder(wrapper.get_base_model())
    inner = wrapper.get_decoder() if hasattr(wrapper, "get_decoder") else model
    return inner if inner is model or not isinstance(inner, nn.Module) else text_decoder(inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """What is known about one model while its components are located."""

    model: nn.Module
    blocks_path: str
    model_type: str
    family: Family | None
    config: Any
    hidden: int
    hook_paths: Mapping[str, str]

    def locate(self, component: str, layer: int, block: nn.Module) -> Hook | str:
        """The hook of one component of one block, or the sentence that says why there is none."""
        if component in self.hook_paths:
            return self._custom(component, layer)
        here = Hook(component=component, layer=layer, path=f"{self.blocks_path}.{layer}", width=self.hidden)
        if component == "residual":
            return here
        if component == "resid_pre":
            return replace(here, take="input")
        if component in ("k_proj", "v_proj"):
            return self._key_or_value(here, block)
        return self._branch(here, block)

    def _custom(self, component: str, layer: int) -> Hook:
        path, _, end = self.hook_paths[component].replace("{layer}", str(layer)).partition(":")
        try:
            module = self.model.get_submodule(path)
        except AttributeError as error:
            raise RequestError(f"hook path {component}={path} names no module of this model: {error}") from None
        take: Literal["output", "input"] = "input" if end else "output"
        return Hook(component=component, layer=layer, path=path, take=take, width=_width(module, take) or self.hidden)

    def _branch(self, here: Hook, block: nn.Module) -> Hook | str:
        if self.family is not None:
            name = self.family.paths[here.component]
        elif here.component.endswith("_contribution"):
            return (
                f"what {self.model_type} adds to the residual stream is not known (it may be scaled or normed "
                "first), so "
                f"{here.component} is not offered; check its code and give --hook-path "
                f"{here.component}={self.blocks_path}.{{layer}}..."
            )
        else:
            names = ATTENTION_NAMES if here.component == "attn_out" else MLP_NAMES
            name = _child(block, names)
            if not name:
                return self._no_module(here, names, block)
        return replace(here, path=f"{here.path}.{name}")

    def _key_or_value(self, here: Hook, block: nn.Module) -> Hook | str:
        name = self.family.attention if self.family else _child(block, ATTENTION_NAMES)
        if not name:
            return self._no_module(here, ATTENTION_NAMES, block)
        attention = block.get_submodule(name)
        single = getattr(attention, here.component, None)
        width = _width(single, "output") if isinstance(single, nn.Module) else None
        if width is not None:
            return replace(here, path=f"{here.path}.{name}.{here.component}", width=width)
        if self.family and self.family.fused and hasattr(attention, self.family.fused[0]):
            fused, columns_of = self.family.fused
            columns = columns_of(self.config)[here.component == "v_proj"]
            path, width = f"{here.path}.{name}.{fused}", columns.groups * columns.width
            return replace(here, path=path, columns=columns, width=width)
        return self._no_key_or_value(here, name, attention)

    def _no_module(self, here: Hook, names: Sequence[str], block: nn.Module) -> str:
        there = ", ".join(child for child, _ in block.named_children())
        return (
            f"layer {here.layer} of {self.model_type} has none of {', '.join(names)}, so its {here.component} is not "
            f"found; it has {there}; leave {here.component} out, or give --hook-path "
            f"{here.component}={self.blocks_path}.{{layer}}..."
        )

    def _no_key_or_value(self, here: Hook, name: str, attention: nn.Module) -> str:
        there = ", ".join(child for child, _ in attention.named_children())
        latent = hasattr(attention, "kv_b_proj")
        why = " (its latent attention makes keys and values from one compressed vector)" if latent else ""
        instead = f"{self.blocks_path}.{{layer}}.{name}.{'kv_b_proj' if latent else '...'}"
        return (
            f"layer {here.layer} of {self.model_type} has no {here.component}{why}; its attention has {there}; leave "
            f"{here.component} out, or give --hook-path {here.component}={instead}"
        )


def _find_blocks(
    model: nn.Module, decoder: nn.Module, family: Family | None, *, hook_paths: Mapping[str, str]
) -> tuple[str, nn.ModuleList]:
    for path in hook_paths.values():
        blocks = path.partition(".{layer}")[0]
        return blocks, _list_at(model, blocks)
    attention = (family.attention,) if family else ATTENTION_NAMES
    mlp = (family.mlp,) if family else MLP_NAMES
    lists = [(name, m) for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    for name, module in sorted(lists, key=lambda item: item[0].count(".")):
        if all(_child(block, attention) and _child(block, mlp) for block in module):
            return ".".join(filter(None, (_name_of(model, decoder), name))), module
    raise ModelError(
        f"{type(decoder).__name__} has no list of blocks that each have one of {', '.join(attention)} and one of "
        f"{', '.join(mlp)} (lists seen: {', '.join(name for name, _ in lists) or 'none'}), so its components "
        f"are not found; {_CURE}"
    )


def _list_at(model: nn.Module, path: str) -> nn.ModuleList:
    module = model.get_submodule(path)
    if not isinstance(module, nn.ModuleList):
        raise RequestError(f"{path} is a {type(module).__name__}, not the list of blocks; {_CURE}")
    return module


def _resolved(model: nn.Module, component: str, path: str) -> str:
    """The hook path as it reads from `model`: a path of the model with a head is found in its base model too."""
    if component not in COMPONENTS:
        raise RequestError(f"hook path for {component!r}, which is not a component; they are {', '.join(COMPONENTS)}")
    module, _, end = path.partition(":")
    if ".{layer}" not in module or end not in ("", "input"):
        raise RequestError(
            f"hook path {component}={path} can't be read; write it as {component}=model.blocks.{{layer}} or "
            "with :input at its end"
        )
    blocks, _, rest = module.partition(".{layer}")
    for start in (blocks, blocks.partition(".")[2]):
        if start and _exists(model, start):
            return f"{start}.{{layer}}{rest}" + (":input" if end else "")
    there = ", ".join(name for name, _ in model.named_children())
    raise RequestError(f"hook path {component}={path}: the model has no module {blocks}; its modules are {there}")


def _exists(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _child(block: nn.Module, names: Sequence[str]) -> str:
    return next((name for name in names if isinstance(getattr(block, name, None), nn.Module)), "")


def _name_of(model: nn.Module, module: nn.Module) -> str:
    names = {id(other): name for name, other in model.named_modules()}
    return str(names[id(module)])


def _width(module: nn.Module, take: str) -> int | None:
    names = ("in_features", "nx") if take == "input" else ("out_features", "nf")
    return next((int(value) for name in names if isinstance(value := getattr(module, name, None), int)), None)


def _template(hook: Hook) -> str:
    path = hook.path.replace(f".{hook.layer}", ".{layer}", 1)
    if hook.columns is not None:
        path += f"[{hook.columns.groups} x {hook.columns.start}:{hook.columns.start + hook.columns.width}]"
    return path + (":input" if hook.take == "input" else "")


def _embedding(decoder: nn.Module) -> nn.Embedding | None:
    return next((module for module in decoder.modules() if isinstance(module, nn.Embedding)), None)


def _hidden(config: Any, embedding: nn.Embedding | None) -> int:
    hidden = getattr(config, "hidden_size", None) or (embedding.embedding_dim if embedding else None)
    if hidden is None:
        raise ModelError("the model's config has no hidden_size and the model no embedding, so its width is not known")
    return int(hidden)


def _dtype_name(embedding: nn.Embedding | None, decoder: nn.Module) -> str:
    weight = embedding.weight if embedding else next(decoder.parameters())
    name = str(weight.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(
            f"the model computes in {name}, which a store does not hold; load it with --dtype {' or '.join(DTYPES)}"
        )
    return name
