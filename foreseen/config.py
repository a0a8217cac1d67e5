"""A job in one YAML: recipes are found, overridden, checked and frozen here.

OmegaConf reads and merges, pydantic checks. The sections are the same for every verb; `method` is the options class
of the method that `method.name` chooses from the verb's own dict, so this file knows no method.
"""

import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from foreseen.errors import BadInput
from foreseen.files import read_text
from foreseen.masked import masked, masked_options

RECIPES = Path(__file__).parent / "configs"
_MAX_RECIPE_BYTES = 1 << 20
_MAX_VALUES = 10_000


class Section(BaseModel):
    """A part of a config: frozen, its numbers finite, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


_S = TypeVar("_S", bound=Section)


class Run(Section):
    """How long, and what is kept."""

    dir: Path
    """Run folder; a run that finds a checkpoint of its own there goes on."""
    steps: int | None = Field(None, ge=1)
    """Optimizer updates; this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data; the resolved config shows the steps as well."""
    save_every: int = Field(500, ge=1)
    """Steps between checkpoints."""
    keep_last: int = Field(3, ge=1)
    """Checkpoints kept besides the best."""
    log_every: int = Field(20, ge=1)
    """Steps between two lines of metrics; the only moments at which the host waits for the device."""
    eval_every: int | None = Field(None, ge=1)
    """Steps between evaluations on the validation samples; null evaluates at every checkpoint."""
    stop_after: int | None = Field(None, ge=1)
    """Evaluations on the validation samples in a row without a better score, after which the run ends; null never ends
    early. The learning rate follows its schedule over the whole length all the same."""
    pictures_every: int | None = Field(None, ge=1)
    """Steps between pictures in TensorBoard; null shows them at every checkpoint."""
    ledger: bool | Literal["pixels"] = False
    """Keep which samples each step consumed in `ledger/samples.npy`, 8 bytes each; "pixels" adds a checksum of the
    pixels, masks and labels made of each, which the loader workers take."""
    recorder: int = Field(100, ge=0)
    """Last steps whose numbers go into the bundle of a bad step; 0 judges none, writes no bundle, never goes back."""
    explode_factor: float | None = Field(20.0, gt=1)
    """A step is bad, too, if its gradient norm is so many times the median of the last 100 good steps, and above all
    good steps of the run; null counts only steps that are not finite."""
    rewind_after: int | None = Field(10, ge=1)
    """After so many bad steps in a row the run goes back to the last good checkpoint and skips their data, once; the
    second time it stops. Null only counts them."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is None and self.epochs is None:
            raise ValueError("run.steps and run.epochs are both null; give one of them")
        return self


class Columns(Section):
    """Which columns of a table or a Hugging Face set say what; null finds the one with a usual name."""

    image: str | None = None
    """The picture, or its path."""
    label: str | None = None
    """Its class, by name or number."""
    split: str | None = None
    """The split that a row belongs to; of a Hugging Face set only where it is named here."""


class Data(Section):
    """Which pictures."""

    path: str | None = None
    """Folder of shards, as `foreseen data pack` writes it, or its URL (`s3://`, `gs://`, `https://`); or a folder of
    pictures, a CSV, JSON lines, a list of paths, `hf:NAME` or `torchvision:NAME@DIR`, which are packed into a cache,
    once. The URL of tars without an index, `https://HOST/NAME-{000000..000009}.tar`, is streamed. Null draws procedural
    pets."""
    shards_at: str | None = None
    """Folder or URL where the tars lie, if not beside the manifest."""
    fetch: Literal["range", "shard"] = "range"
    """Of shards behind a URL: each picture by itself, many at a time, or whole shards into a cache on this machine."""
    cache_dir: Path | None = None
    """Where whole shards are kept, for all ranks of a machine; null takes XDG_CACHE_HOME/foreseen/shards."""
    cache_gb: float = Field(50.0, gt=0)
    """Most gigabytes (1e9 bytes) of whole shards kept there; those used longest ago go first."""
    storage_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the server's file system in fsspec, such as `endpoint_url` or `anon`. Credentials are better given in
    the environment; here they reach no record and no message."""
    order: Literal["full", "block"] = "full"
    """`full` takes every sample from any shard; `block` permutes the shards, and the samples within each block of
    `block_shards`, so that few shards are needed at a time. Another order is another run."""
    block_shards: int = Field(16, ge=1)
    """Shards in a block: the larger, the better mixed."""
    repeats: int = Field(1, ge=1)
    """How often each sample stands in a global batch, augmented anew each time; DeiT takes 3. An epoch then sees one
    sample in so many."""
    samples: int | None = Field(None, ge=1)
    """Of a stream: samples that make an epoch; null makes the whole run one, and needs `run.steps`."""
    shuffle_buffer: int = Field(1000, ge=1)
    """Of a stream: pictures from which each loader process draws the next one."""
    allow_shell_urls: bool = False
    """Of a stream: run `pipe:COMMAND` in a shell. Whoever writes `data.path` may then run anything."""
    columns: Columns = Columns()
    hf_config: str | None = None
    """Configuration of a Hugging Face set that has several."""
    split: str = "train"
    test_split: str = "test"
    """Read once, at the very end of fine-tuning."""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of each class set aside as the test split of labelled pictures that come without one; not for shards."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of each class of `split` that fine-tuning sets aside to choose by."""
    shots: int | None = Field(None, ge=1)
    """Labelled samples per class that fine-tuning may train on; null takes all."""
    subset_seed: int = 0
    """Which samples become validation and shots."""
    balance: Literal["sqrt", "full"] | None = None
    """How often rare classes are seen in training: `full` sees all classes alike, `sqrt` each by the square root of its
    size; null, or none, as they occur. An epoch is as long as without."""
    workers: int = Field(4, ge=0)
    """Loader processes per rank; the batches do not depend on it."""
    fast_decode: bool = True
    """Decode plain JPEGs with torchcodec where it is installed (extra `fast`)."""
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    """Share of the samples trained on that may be unreadable; past it the run stops. Each counts once, however many
    epochs meet it again."""
    max_pixels: int = Field(64_000_000, ge=1, le=178_000_000)
    """Most pixels of a picture, width × height; its header decides, before any pixel is decoded."""
    max_bytes: int = Field(64 << 20, ge=1)
    """Most bytes of a picture, encoded."""

    @field_validator("balance", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @property
    def shards_in_block(self) -> int | None:
        """Of the block order; None with the full one."""
        return self.block_shards if self.order == "block" else None


class Model(Section):
    """Which backbone, by timm's names."""

    name: str | None = None
    """A timm model; null takes that of `init_from`."""
    img_size: tuple[int, int] | None = None
    """Input (height, width) in pixels; null takes `views.size`."""
    init_from: str | None = None
    """Weights to begin from: an encoder folder, or `timm:NAME` for public weights."""
    drop_path_rate: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: the probability that the last block's residual paths are dropped, rising linearly to there."""
    drop_path_uniform: bool = False
    """The same rate in all blocks."""
    args: dict[str, Any] = Field(default_factory=dict)
    """More keyword arguments of the timm model, such as `patch_size` or `depth`; null clears a recipe's."""

    @field_validator("args", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("args")
    @classmethod
    def _names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.isidentifier():
                raise ValueError(
                    f"model.args {name!r} is no name of an argument; in YAML a space follows the colon, as in "
                    '"model.args={depth: 6}", and model.args.depth=6 does without'
                )
        return value

    @field_validator("img_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value


class Jitter(Section):
    """Random brightness, contrast, saturation and hue, in random order, as torchvision's ColorJitter defines them."""

    brightness: float = Field(0.0, ge=0)
    """The factor is uniform in [max(0, 1 - this), 1 + this]; so are those of contrast and saturation."""
    contrast: float = Field(0.0, ge=0)
    saturation: float = Field(0.0, ge=0)
    hue: float = Field(0.0, ge=0, le=0.5)
    """The hue turns by a share of the circle that is uniform in [-this, this]."""
    probability: float = Field(1.0, ge=0, le=1)


class Blur(Section):
    """A Gaussian blur whose standard deviation is uniform in `radius`."""

    probability: float = Field(0.5, ge=0, le=1)
    radius: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation in pixels of the crop; Pillow calls it the radius."""
    kernel_size: int | None = Field(None, ge=3)
    """Pixels of torchvision's kernel, odd: 9 for DINOv2, 23 for BYOL; null is Pillow's blur, as in DINO and MoCo v3."""

    @model_validator(mode="after")
    def _some_blur(self) -> Self:
        if not 0 < self.radius[0] <= self.radius[1] <= 100:
            raise ValueError(f"blur.radius must be two rising numbers of pixels in (0, 100], got {self.radius}")
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise ValueError(f"blur.kernel_size must be odd, got {self.kernel_size}")
        return self


class Solarise(Section):
    """Invert the values, of 0 to 255, that are not below a threshold."""

    probability: float = Field(0.2, ge=0, le=1)
    threshold: int = Field(128, ge=0, le=255)


class Colour(Section):
    """What is done to the colours of a crop, in this order: jitter, grey, blur, solarise.

    Papers that jitter the whole picture before they crop it, as BEiT, differ in one point: contrast is taken about the
    mean of the crop here and about that of the picture there. The other operations commute with cropping.
    """

    jitter: Jitter | None = None
    grey: float = Field(0.0, ge=0, le=1)
    """Probability of losing all colour."""
    blur: Blur | None = None
    solarise: Solarise | None = None
    exact: bool = False
    """Run the papers' own operations on 8-bit pixels in the loader processes, which are slow; otherwise the same is
    computed on the training device, a level or so apart."""


class Views(Section):
    """How an image becomes an input."""

    size: tuple[int, int] = (224, 224)
    """(height, width) in pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest aspect ratio of a crop."""
    simple_crop: bool = False
    """DeiT III's simple random crop instead: the picture is resized until it covers the size, and shifted by what is
    left over and 4 pixels; `scale` and `ratio` are then not used."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    rand_augment: str | None = None
    """RandAugment in timm's notation, such as `rand-m9-mstd0.5-inc1`."""
    three_augment: float | None = Field(None, ge=0, lt=1)
    """DeiT III's 3-Augment instead: one of grey, solarise and blur, then brightness, contrast and saturation changed by
    so much at most; the paper's is 0.3."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability of random erasing, with normal noise per pixel."""
    colour: Colour | None = None
    """Colour jitter, grey, blur and solarise; null for none."""
    mean: tuple[float, float, float] | None = None
    """Channel means to normalise by, for pixels in [0, 1]; null takes the encoder's, else ImageNet's."""
    std: tuple[float, float, float] | None = None
    centre_fraction: float | None = Field(None, gt=0, le=1)
    """Share of the resized picture's side that fine-tuning evaluates on; null is 0.875 up to 224 px, and 1 above."""

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if min(self.size) < 1:
            raise ValueError(f"views.size must be positive, got {self.size}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"views.scale must be two rising shares in (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"views.ratio must be two rising positive numbers, got {self.ratio}")
        if self.rand_augment is not None and self.three_augment is not None:
            raise ValueError("views.rand_augment and views.three_augment are both given; set one of them to null")
        return self


class Optim(Section):
    """The optimizer and its schedule, a pure function of the step."""

    name: str = "adamw"
    """A name that timm's optimizer factory knows; adamw is torch's fused one, lars that of DINO's code."""
    base_lr: float = Field(gt=0)
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """The lr is base_lr × global_size / lr_reference_batch, times its square root, or base_lr as it stands."""
    lr_reference_batch: int = Field(256, ge=1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    weight_decay_end: float | None = Field(None, ge=0)
    """Where weight decay ends: half a cosine leads there from `weight_decay`, from the first step on; null keeps it."""
    warmup_epochs: float | None = Field(None, ge=0)
    warmup_steps: int | None = Field(None, ge=0)
    """Linear warm-up from 0; this or `warmup_epochs`, both null for none."""
    warmup_ends_at_peak: bool = False
    """Whether the last step of the warm-up is made at the peak, as in DINO's code, or the one after it, as in MAE's."""
    min_lr: float = Field(0.0, ge=0)
    """Where the cosine ends."""
    clip_grad: float | None = Field(None, gt=0)
    """Largest gradient norm; null never clips."""
    clip_per: Literal["global", "parameter", "module"] = "global"
    """Whose norm is limited: that of all gradients together, of each tensor alone (DINO, iBOT), or of each network and
    head (DINOv2)."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Each layer's lr is this times the next one's, towards the input; the head keeps the full lr."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """What an average of the weights keeps of itself at each step, such as 0.9999; the average is what is scored and
    handed over. Null keeps none."""


class BatchSize(Section):
    """ranks × micro_size × accumulation = global_size."""

    global_size: int = Field(ge=1)
    """Samples per optimizer step, over all ranks."""
    micro_size: int | None = Field(None, ge=1)
    """Samples per rank and forward; null takes the rank's whole share at once."""


class Compute(Section):
    """How the arithmetic is done."""

    precision: Literal["bf16", "fp16", "fp32", "fp64"] = "bf16"
    """bf16 and fp16 are autocast with fp32 weights; fp16 scales its loss, for devices that have no bf16."""
    compile: bool | str = False
    """Compile the repeated blocks of all networks: true takes torch.compile's inductor, a name another backend. It pays
    on a GPU in runs of more than some minutes; results stay but for rounding."""
    checkpoint_activations: bool = False
    """Keep only what goes into each block and compute the rest again in the backward pass: a third to a half slower,
    much less memory, the same results."""

    @property
    def backend(self) -> str | None:
        """The backend of torch.compile; None where nothing is compiled."""
        return "inductor" if self.compile is True else self.compile or None


class Probe(Section):
    """Judging the frozen encoder while pretraining runs; the other verbs do not. It never changes the run.

    With labels, a part of the pictures votes (k-NN) or trains (linear) and the rest is judged; test splits are not
    read. Without, the spectrum of the features is looked at.
    """

    every: int | None = Field(None, ge=1)
    """Steps between two probes, beginning before the first step and ending after the last; null never probes."""
    data: str | None = None
    """Labelled pictures to judge by, found as `data.path` is, and read by the same columns and fractions; null looks at
    those of `data.path`, as if they had no labels."""
    split: str = "train"
    """Of `data`."""
    labels: bool = False
    """With `data` null: judge by the labels of `data.path` itself. The pictures are then those of pretraining, which
    may flatter."""
    samples: int = Field(5000, ge=2)
    """Most pictures that a probe looks at, chosen once."""
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of each class that is judged."""
    features: Literal["cls", "mean", "both"] | None = None
    """Class token, mean of the patches, or both; null takes the model's own way of pooling."""
    knn: bool = True
    """Weighted k-nearest neighbours, where there are labels."""
    linear: bool = False
    """A linear probe, where there are labels; it takes longer."""


class MethodOptions(Section):
    """The options of a method; each method has its own class."""

    has_backbone: ClassVar[bool] = True
    """Whether it trains a timm model, which `model` names."""
    name: str

    def control(self) -> "tuple[MethodOptions, str] | None":
        """The same method without the network that it learns from, and where that lies; None if it learns from none."""
        return None


class Config(Section):
    """One whole job."""

    seed: int = Field(0, ge=0)
    run: Run
    data: Data = Data()
    model: Model = Model()
    method: MethodOptions
    views: Views = Views()
    optim: Optim
    batch: BatchSize
    compute: Compute = Compute()
    probe: Probe = Probe()

    @model_validator(mode="after")
    def _some_model(self) -> Self:
        named = self.model.name or self.model.init_from
        if self.method.has_backbone and named is None:
            raise ValueError("model.name and model.init_from are both null; give one of them")
        if not self.method.has_backbone and named is not None:
            raise ValueError(f"method {self.method.name} has networks of its own, not {named}: leave model out")
        return self

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.model.img_size is not None and self.model.img_size != self.views.size:
            raise ValueError(
                f"model.img_size {list(self.model.img_size)} differs from views.size {list(self.views.size)}; "
                "leave model.img_size out"
            )
        return self

    def with_length(self, num_samples: int) -> "Config":
        """The same config with both `run.steps` and `run.epochs`, and the warm-up in steps, for a set of N samples."""
        per_epoch = num_samples / self.batch.global_size
        steps = self.run.steps or max(1, round((self.run.epochs or 0) * per_epoch))
        warmup = self.optim.warmup_steps
        if warmup is None:
            warmup = round((self.optim.warmup_epochs or 0) * per_epoch)
        if warmup >= steps:
            raise BadInput(
                f"the warm-up of {warmup} steps is not shorter than the run of {steps} steps; "
                "lower optim.warmup_epochs or optim.warmup_steps, or raise run.epochs or run.steps"
            )
        return self.model_copy(
            update={
                "run": self.run.model_copy(update={"steps": steps, "epochs": steps / per_epoch}),
                "optim": self.optim.model_copy(update={"warmup_steps": warmup, "warmup_epochs": warmup / per_epoch}),
            }
        )

    def public(self) -> dict[str, Any]:
        """As plain values for records, without credentials."""
        raw = self.model_dump(mode="json")
        data = raw["data"]
        data["storage_options"] = masked_options(data["storage_options"])
        for section, key in ((data, "path"), (data, "shards_at"), (raw["probe"], "data")):
            section[key] = None if section[key] is None else masked(section[key])
        return raw

    def to_yaml(self) -> str:
        """The resolved config as a recipe, without credentials."""
        return yaml.safe_dump(self.public(), sort_keys=False, default_flow_style=None, width=120)


def recipe_names(verb: str) -> list[str]:
    """Names of the shipped recipes of a verb."""
    return sorted(path.stem for path in (RECIPES / verb).glob("*.yaml"))


def find_recipe(verb: str, recipe: str) -> Path:
    """The file of a recipe: a shipped one by name, or the path of a YAML."""
    if recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise BadInput(f"there is no recipe file {recipe}")
        return Path(recipe)
    path = RECIPES / verb / f"{recipe}.yaml"
    if not path.is_file():
        names = recipe_names(verb)
        raise BadInput(
            f"there is no {verb} recipe {recipe!r}{_did_you_mean(recipe, names)}; there are {', '.join(names)}, "
            "or give the path of a .yaml file"
        )
    return path


def load(
    verb: str, recipe: str, overrides: Sequence[str], methods: Mapping[str, type[MethodOptions]]
) -> Config:  # fmt: skip
    """Read a recipe, apply overrides, and check the result.

    Args:
        verb: whose recipes are looked up, such as "pretrain".
        recipe: a name or the path of a YAML.
        overrides: dotted `key=value`, values in YAML. A `model.name` of another family (another module of timm)
            than the recipe's leaves its `model.args` behind.
        methods: options class of each method that the verb knows.

    Raises:
        BadInput: for each key that is unknown or has a value out of bounds, a line that says so.
    """
    return resolve(read_recipe(verb, recipe, overrides), methods)


def read_recipe(verb: str, recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Read a recipe and apply overrides, unchecked but for its form; see `load`.

    Raises:
        BadInput: it cannot be found or read.
    """
    for override in overrides:
        if "=" not in override:
            raise BadInput(f"{override!r} is no override; write key=value, such as run.steps=100")
    path = find_recipe(verb, recipe)
    try:
        text = read_text(path, max_bytes=_MAX_RECIPE_BYTES)
        for part in (text, *(override.partition("=")[2] for override in overrides)):
            _check_expansion(part)
        parts = OmegaConf.load(io.StringIO(text)), OmegaConf.from_dotlist(list(overrides))
        for found in parts:
            _refuse_interpolation(OmegaConf.to_container(found, resolve=False))
        _drop_other_models_args(*parts)
        raw = OmegaConf.to_container(OmegaConf.merge(*parts))
    except BadInput:
        raise
    except Exception as error:  # yaml's and OmegaConf's own, and what both let through on malformed input
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadInput(f"{path} with overrides {list(overrides)} cannot be read: {reason}") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{path} is no recipe: it holds no sections")
    return {str(key): value for key, value in raw.items()}


def _drop_other_models_args(recipe: Any, overrides: Any) -> None:
    if not OmegaConf.select(recipe, "model.args"):
        return
    own, other = OmegaConf.select(recipe, "model.name"), OmegaConf.select(overrides, "model.name")
    if own != other and None not in (families := (_family(own), _family(other))) and len(set(families)) == 2:
        recipe.model.args = {}


def _family(name: Any) -> str | None:
    """The module of timm that a model is from; None where timm has no such model."""
    from timm.models import is_model, model_entrypoint, split_model_name_tag

    plain = split_model_name_tag(name)[0] if isinstance(name, str) else ""
    return str(model_entrypoint(plain).__module__) if is_model(plain) else None


def read_yaml(file: Path) -> Any:
    """What a YAML file of plain values holds, such as the resolved config in a run folder.

    Raises:
        BadInput: it is no such file, or a very large one.
        OSError: it cannot be read.
    """
    try:
        text = read_text(file, max_bytes=_MAX_RECIPE_BYTES)
        _check_expansion(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file} is no YAML that can be read: {error}") from None


def _check_expansion(text: str) -> None:
    """Refuse YAML whose aliases would unfold to more than a recipe: ten lines can name a billion values.

    Only nodes are composed here, which runs no tag and shares what an alias repeats.
    """
    pending, count = [yaml.compose(text, Loader=yaml.SafeLoader)], 0
    while pending:
        node = pending.pop()
        count += 1
        if count > _MAX_VALUES:
            raise BadInput(f"a recipe or an override holds more than {_MAX_VALUES:,} values, aliases counted each time")
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            pending.extend(part for pair in node.value for part in pair)


def _refuse_interpolation(value: Any, key: str = "") -> None:
    """Refuse `${…}`: a recipe is data, and OmegaConf's would read the environment of whoever runs it."""
    if isinstance(value, dict):
        for name, part in value.items():
            _refuse_interpolation(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for part in value:
            _refuse_interpolation(part, key)
    elif isinstance(value, str) and "${" in value:
        raise BadInput(f"{key} is {value!r}: a recipe does not look up ${{…}}; write the value itself")


def resolve(raw: dict[str, Any], methods: Mapping[str, type[MethodOptions]]) -> Config:
    """Check a config given as nested dicts; see `load`."""
    options = raw.get("method")
    name = options.get("name") if isinstance(options, dict) else None
    if not isinstance(name, str) or name not in methods:
        raise BadInput(
            f"method.name is {name!r}{_did_you_mean(str(name), methods)}; there are {', '.join(sorted(methods))}"
        )

    class Resolved(Config):
        method: methods[name]  # type: ignore[valid-type]

    return checked(Resolved, raw, methods)


def checked(kind: type[_S], raw: Any, methods: Mapping[str, type[MethodOptions]] | None = None) -> _S:
    """Check a section given as nested dicts.

    Args:
        kind: its class.
        raw: its keys and values.
        methods: whose options an unknown key may belong to.

    Raises:
        BadInput: as of `load`.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise BadInput("\n".join(_sentences(error, kind, methods or {}))) from None


def _sentences(
    error: ValidationError, config: type[BaseModel], methods: Mapping[str, type[MethodOptions]]
) -> list[str]:
    known = list(_keys(config))
    sentences = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            owners = [name for name, options in methods.items() if key in set(_keys(options, "method."))]
            if owners:
                sentences.append(f"{key!r} is an option of {', '.join(owners)}, not of the method chosen")
            else:
                sentences.append(f"unknown key {key!r}{_did_you_mean(key, known)}")
        elif problem["type"] == "missing":
            sentences.append(f"{key} is missing; give it in the recipe or as {key}=VALUE")
        elif problem["type"] == "value_error":
            sentences.append(str(problem["ctx"]["error"]))
        else:
            reason = problem["msg"].removeprefix("Input ")
            sentences.append(f"{key} {reason}, got {problem['input']!r}")
    return sentences


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        for kind in get_args(info.annotation) or (info.annotation,):  # `Colour | None` holds the keys of Colour
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{prefix}{name}.")


def _did_you_mean(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    section, _, leaf = word.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    # Within its section a key is looked for by a part of its name first, so that `lr` finds `base_lr`.
    close = sorted((name for name in siblings if leaf in name), key=len) or difflib.get_close_matches(leaf, siblings)
    matches = [siblings[name] for name in close] or difflib.get_close_matches(word, list(known))
    return f" (did you mean {' or '.join(repr(match) for match in matches[:2])}?)" if matches else ""
