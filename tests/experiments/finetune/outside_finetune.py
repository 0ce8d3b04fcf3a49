"""finetune with tunix's models: `make test-outside`.

Not with the other tests: the package brings 1 GB of others with it.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh

import dualpipe_jax as dpj
from experiments.finetune import families
from experiments.finetune.finetune import main
from experiments.finetune.model import Lora, Model, is_adapter
from experiments.finetune.weights import Folder, Weights
from experiments.train_lm.trainer import state
from tests.experiments.finetune.published import KINDS, VOCABULARY, make
from tests.models import assert_close
from tests.processes import run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of tunix and its imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ROWS, LENGTH = 4, 9
FLOAT32 = jnp.dtype("float32")


def mesh_of() -> Mesh:
    return jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])


def make_batch() -> jax.Array:
    return jax.random.randint(jax.random.key(3), (ROWS, LENGTH), 0, VOCABULARY, jnp.int32)


def load(folder: Path, *, lora: Lora | None = None) -> tuple[Model, Weights, Any]:
    """Reads a folder over two ranks."""
    published = families.read(folder)
    model = Model(published, dtype=FLOAT32, lora=lora, rows=ROWS // 2, length=LENGTH)
    weights = Weights(Folder(folder), published, model.own)
    specs = model.specs(mesh_of())
    specs = specs if lora is None else model.split(specs)[1]
    return model, weights, weights.load(model.placed(mesh_of(), model.own, specs))


def load_by_tunix(folder: Path, model: Model) -> Any:
    """Reads a folder by tunix's own loader."""
    family = model.published.family
    loader = importlib.import_module(f"tunix.models.{family.name}.{family.params}")
    config = model.published.tunix_config(FLOAT32)
    return loader.create_model_from_safe_tensors(str(folder), config, dtype=FLOAT32)


def on_one_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, jax.device_get(tree))


def read_all(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Reads all tensors, by file and name."""
    return {
        file.name: safetensors.numpy.load_file(file)
        for file in sorted(folder.glob("*.safetensors"))
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_model_trains_as_tunix_own_and_leaves_as_it_came(
    kind: str, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    make(folder, **KINDS[kind])
    model, weights, params = load(folder)
    assert weights.unknown == ["model.rotary_emb.inv_freq"]

    net, tokens = load_by_tunix(folder, model), make_batch()
    graph, own = nnx.split(net)
    own = nnx.to_pure_dict(own)
    assert_close(model.pipelined.tree(params), own, tolerance=0)

    def own_loss(own: Any) -> jax.Array:
        length = LENGTH - 1
        positions = jnp.broadcast_to(jnp.arange(length), (ROWS, length))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (ROWS, length, length))
        with model.published.rope():
            logits = nnx.merge(graph, own)(tokens[:, :-1], positions, None, mask)[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    # tunix computes in float32: sums in another order differ by 3e-5 of the scale of a norm.
    want = jax.jit(jax.value_and_grad(own_loss))(own)
    specs = model.to_tree(model.specs(mesh_of()))
    grad_fn = dpj.value_and_grad(
        model.pipelined, mesh=mesh_of(), num_microbatches=2, param_specs=specs
    )
    loss, grads = jax.jit(grad_fn)(params, tokens)
    assert_close((loss, model.pipelined.tree(grads)), want, tolerance=5e-5)

    target = tmp_path / "out"
    weights.save(target, params, mesh=mesh_of(), merge=model.merge)
    assert sorted(path.name for path in target.iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    before, after = read_all(folder), read_all(target)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for file, tensors in before.items():
        with safetensors.safe_open(target / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert (tensor.dtype, tensor.shape) == (
                after[file][name].dtype,
                after[file][name].shape,
            )
            assert tensor.tobytes() == after[file][name].tobytes(), name
    loaded = on_one_device(load(target)[2])
    again = jax.jit(model.logits)(model.pipelined.tree(loaded), tokens)
    np.testing.assert_array_equal(again, jax.jit(model.logits)(own, tokens))


@pytest.mark.parametrize("kind", ["qwen3", "gemma"])
def test_lora_trains_adapters_alone_and_is_merged(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    make(folder, **KINDS[kind])
    model, weights, frozen = load(folder, lora=Lora(rank=3, alpha=6.0))
    tokens, here = make_batch(), on_one_device(frozen)
    trained = model.init(jax.random.key(1))
    logits = jax.jit(model.logits)
    plain = logits(model.pipelined.tree(model.join(trained, here)), tokens)
    base = Model(model.published, dtype=FLOAT32, lora=None, rows=ROWS // 2, length=LENGTH)
    want = jax.jit(base.logits)(base.pipelined.tree(here), tokens)
    assert_close(plain, want, tolerance=1e-6)  # B is zero

    # B at random, so that A has gradients too.
    keys = iter(jax.random.split(jax.random.key(2), len(jax.tree.leaves(trained))))
    trained = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape, leaf.dtype), trained
    )
    params = model.join(jax.device_put(trained, dpj.shardings(trained, mesh=mesh_of())), frozen)
    grad_fn = dpj.value_and_grad(
        model.pipelined, mesh=mesh_of(), num_microbatches=2, trainable=model.is_trained
    )
    loss, grads = jax.jit(grad_fn)(params, tokens)
    grads = model.split(grads)[0]
    assert all(map(is_adapter, grads["blocks"]))
    assert grads.keys() == {"blocks"}

    def own_loss(trained: Any) -> jax.Array:
        return model.loss(model.pipelined.tree(model.join(trained, here)), tokens)

    assert_close((loss, grads), jax.jit(jax.value_and_grad(own_loss))(trained), tolerance=1e-5)
    optimizer, _ = state.make_optimizer(
        learning_rate=0.1, steps=1, is_decayed=lambda params: jax.tree.map(lambda _: False, params)
    )
    moments = jax.eval_shape(optimizer.init, trained)
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(trained))
    assert sum(leaf.size for leaf in jax.tree.leaves(moments)) <= 2 * num_trained + 2  # counters

    target = tmp_path / "out"
    weights.save(target, params, mesh=mesh_of(), merge=model.merge)
    _, _, merged = load(target)
    got = jax.jit(base.logits)(base.pipelined.tree(on_one_device(merged)), tokens)
    want = logits(model.pipelined.tree(model.join(trained, here)), tokens)
    assert_close(got, want, tolerance=1e-5)


def test_a_process_reads_the_layers_of_its_own_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    # 8 layers of 13 MB beside ends of 1.2 MB.
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 8}
    make(folder, model_type="qwen3", shards=3, **sizes)
    command = ["-m", "tests.experiments.finetune.loading_worker", str(folder)]
    printed = run(command, count=4, folder=tmp_path / "processes")
    figures = [json.loads(text.strip().splitlines()[-1]) for text in printed]
    assert [figure["layers"] for figure in figures] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    print(*figures, sep="\n")
    for figure in figures:
        # Its layers and its part of the embedding; for a moment, a leaf of its layers twice.
        assert figure["held"] < 0.251 * figure["whole"]
        assert figure["memory"] < 0.6 * figure["whole"]


def test_the_command_resumes_and_writes_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # JAX's backends have started here, so the fake devices are the eight of tests/conftest.py.
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    folder, output = tmp_path / "in", tmp_path / "run"
    make(folder, **KINDS["qwen3"])
    command = f"--model {folder} --data {Path(__file__).parent} --output {output} --lora-rank 2"
    command += " --context 8 --batch-size 4 --microbatches 2 --eval-batches 1 --learning-rate 0.1"
    main([*command.split(), "--steps", "2"])
    first = read_all(output / "model")
    main([*command.split(), "--steps", "3", "--ranks", "1", "--schedule", "1f1b"])
    assert "resumed   after step 2" in capsys.readouterr().out
    second, given = read_all(output / "model"), read_all(folder)
    for file, tensors in given.items():
        for name, tensor in tensors.items():
            is_matrix = "_proj" in name
            assert (tensor.tobytes() != first[file][name].tobytes()) == is_matrix, name
            assert (tensor.tobytes() != second[file][name].tobytes()) == is_matrix, name
    # Killed after its last checkpoint and before the model was written.
    (output / "model").rename(tmp_path / "kept")
    with pytest.raises(SystemExit):
        main([*command.split(), "--steps", "3"])
    again = read_all(output / "model")
    for file, tensors in second.items():
        for name, tensor in tensors.items():
            assert tensor.tobytes() == again[file][name].tobytes(), name


def test_llama_computes_as_transformers_own(tmp_path: Path) -> None:
    llama = importlib.import_module("transformers.models.llama.modeling_flax_llama")
    folder = tmp_path / "in"
    # That model's base is 10,000; tunix's own, without ours, is 1,000,000.
    entries = {"model_type": "llama", "tie_word_embeddings": False, "rope_theta": 10_000.0}
    tensors = make(folder, **entries)
    config = importlib.import_module("transformers").LlamaConfig.from_pretrained(folder)
    params: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, _ = name.split(".")
        if "rotary_emb" in path:
            continue
        at = params
        for key in path:
            at = at.setdefault(key, {})
        if "embed_tokens" in path:
            at["embedding"] = tensor
        elif tensor.ndim == 2:
            at["kernel"] = tensor.T
        else:
            at["weight"] = tensor
    tokens = make_batch()
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    module = llama.FlaxLlamaForCausalLMModule(config)
    want = module.apply({"params": params}, tokens, jnp.ones((ROWS, LENGTH)), positions).logits
    model, _, ours = load(folder)
    got = jax.jit(model.logits)(model.pipelined.tree(on_one_device(ours)), tokens)
    assert_close(got, want, tolerance=1e-5)
