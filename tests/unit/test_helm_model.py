"""How pods get the checkpoint. The init container's script runs here, with downloads that only pretend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helm_charts import DEFAULT, rendered

import cluster
from cluster.checkpoint.model_files import located
from cluster.checkpoint.reader import CheckpointReader

S3 = {"model.source": {"objectStorage": {"url": "s3://bucket/model"}}}
GCS = {"model.source": {"objectStorage": {"url": "gs://bucket/a/model", "secretName": "gcs"}}}
DEMO = {"model.source": {"demo": {"seed": 3}}, "model.name": "demo"}


def init_container(shape, changes=None, role="attention"):
    [found] = rendered(shape, changes).pods[role]["spec"]["initContainers"]
    return found


class Node:
    """A node's cache, and programs in the place of those that download."""

    def __init__(self, folder):
        self.folder, self.programs, self.calls = folder, folder / "bin", folder / "calls"
        self.programs.mkdir()
        self.calls.touch()

    def install(self, name, script):
        program = self.programs / name
        program.write_text(f'#!/bin/sh\necho "$@" >> {self.calls}\n{script}\n')
        program.chmod(0o755)

    def start(self, found):
        variables = {v["name"]: v["value"] for v in found["env"] if "value" in v}
        variables["MODEL_DIR"] = str(self.folder / Path(variables["MODEL_DIR"]).name)
        path = f"{self.programs}:{Path(sys.executable).parent}:/usr/bin:/bin"
        environment = {"PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)} | variables
        command = [*found["command"], *found["args"]]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, found):
        process = self.start(found)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    node.install("rclone", 'for last in "$@"; do :; done; echo weights > "$last/model.safetensors"')
    return node


def test_a_download_happens_once(node):
    found = init_container("a2.7b", S3)
    assert node.run(found) == (0, "")
    assert (node.folder / "Qwen1.5-MoE-A2.7B-Chat" / "model.safetensors").read_text() == "weights\n"
    code, output = node.run(found)
    assert code == 0
    assert "is there" in output
    [call] = node.calls.read_text().splitlines()
    assert call.startswith("copy --config= --transfers=8 :s3,provider=AWS,env_auth=true:bucket/model ")


def test_pods_that_start_together_download_once(node):
    processes = [node.start(init_container("a2.7b", S3)) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
    assert len(node.calls.read_text().splitlines()) == 1
    for process in processes:
        process.communicate()


def test_a_download_that_breaks_off_leaves_no_model_and_goes_on_later(node):
    node.install("rclone", 'for last in "$@"; do :; done; touch "$last/part"; exit 1')
    code, _ = node.run(init_container("a2.7b", S3))
    assert code == 1
    assert not (node.folder / "Qwen1.5-MoE-A2.7B-Chat").exists()
    node.install("rclone", "exit 0")
    assert node.run(init_container("a2.7b", S3)) == (0, "")
    assert (node.folder / "Qwen1.5-MoE-A2.7B-Chat" / "part").exists()


def test_another_model_under_the_same_name_is_refused(node):
    node.run(init_container("a2.7b", S3))
    code, output = node.run(init_container("a2.7b", GCS))
    assert code == 1
    assert "holds s3://bucket/model, not gs://bucket/a/model" in output


@pytest.mark.parametrize(
    ("shape", "changes", "remote"),
    [
        ("cpu-experts", None, ":s3,provider=AWS,env_auth=true:models.example.com/Qwen1.5-MoE-A2.7B-Chat"),
        ("cpu-experts", GCS, ":gcs,env_auth=true,bucket_policy_only=true:bucket/a/model"),
    ],
)
def test_object_storage_is_copied_by_rclone(node, shape, changes, remote):
    node.install("rclone", 'for last in "$@"; do :; done; touch "$last/config.json"')
    assert node.run(init_container(shape, changes)) == (0, "")
    assert remote in node.calls.read_text()
    assert (node.folder / "Qwen1.5-MoE-A2.7B-Chat" / "config.json").exists()


def test_the_demo_makes_a_checkpoint_that_loads(node):
    assert node.run(init_container("laptop", DEMO)) == (0, "")
    CheckpointReader(node.folder / "demo").check_names()


def test_a_bucket_is_read_with_what_a_secret_holds():
    assert init_container("cpu-experts", GCS)["envFrom"] == [{"secretRef": {"name": "gcs"}}]


def hub(**source):
    return {"model.source": {"huggingFace": {"repository": "Qwen/Qwen1.5-MoE-A2.7B-Chat", **source}}}


def test_pods_fetch_from_the_hub_by_themselves():
    source = hub(endpoint="https://hub.example.com", tokenSecret={"name": "hugging-face", "key": "token"})
    objects = rendered("a2.7b", source)
    for role, pod in objects.pods.items():
        [found] = pod["spec"]["containers"]
        variables = {v["name"]: v.get("value", v.get("valueFrom")) for v in found["env"]}
        assert "initContainers" not in pod["spec"], role
        assert variables["HF_HOME"] == "/models"
        assert variables["HF_ENDPOINT"] == "https://hub.example.com"
        assert variables["HF_TOKEN"] == {"secretKeyRef": {"name": "hugging-face", "key": "token"}}
        [mount] = [mount for mount in found["volumeMounts"] if mount["name"] == "model"]
        assert mount == {"name": "model", "readOnly": False, "mountPath": "/models"}


@pytest.mark.parametrize(
    ("changes", "model", "model_id"),
    [
        (hub(), "Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen1.5-MoE-A2.7B-Chat"),
        (hub(revision="ec05") | {"model.name": ""}, "Qwen/Qwen1.5-MoE-A2.7B-Chat@ec05", None),
        (hub() | {"cluster.model_id": "mine"}, "Qwen/Qwen1.5-MoE-A2.7B-Chat", "mine"),
        (S3, "/models/Qwen1.5-MoE-A2.7B-Chat", None),
    ],
)
def test_the_application_takes_the_name_as_users_give_it(changes, model, model_id):
    args = rendered("a2.7b", changes).serve_config["applications"][0]["args"]
    assert (args["model"], args.get("model_id")) == (model, model_id)
    assert located(model) == model


def test_without_a_token_and_a_mirror_their_variables_are_absent():
    names = {v["name"] for v in rendered("a2.7b", hub()).pods["head"]["spec"]["containers"][0]["env"]}
    assert not names & {"HF_TOKEN", "HF_ENDPOINT"}
    assert "HF_HOME" not in {v["name"] for v in rendered("57b").pods["head"]["spec"]["containers"][0]["env"]}


def volume(shape, changes=None):
    [found] = [v for v in rendered(shape, changes).pods["experts"]["spec"]["volumes"] if v["name"] == "model"]
    return {key: value for key, value in found.items() if key != "name"}


def test_a_claim_with_the_model_is_mounted_where_it_is_looked_for():
    objects = rendered("57b")
    for pod in objects.pods.values():
        assert "initContainers" not in pod["spec"]
        [found] = pod["spec"]["containers"]
        [mount] = [mount for mount in found["volumeMounts"] if mount["name"] == "model"]
        assert mount["mountPath"] == objects.serve_config["applications"][0]["args"]["model"]
        assert mount["subPath"] == "Qwen2-57B-A14B-Instruct"
    assert volume("57b") == {"persistentVolumeClaim": {"claimName": "checkpoints", "readOnly": True}}


def test_a_download_is_kept_where_it_is_said():
    assert volume("a2.7b") == {"persistentVolumeClaim": {"claimName": "models"}}
    assert volume("cpu-experts") == {"emptyDir": {"sizeLimit": "40Gi"}}
    assert volume("laptop", DEMO) == {"emptyDir": {}}
    on_node = volume("laptop", DEMO | {"model.cache": {"hostPath": "/var/lib/models"}})
    assert on_node == {"hostPath": {"path": "/var/lib/models", "type": "DirectoryOrCreate"}}


def test_without_any_values_the_pods_serve_the_model_in_the_image_on_cpus():
    objects = rendered(DEFAULT)
    args = objects.serve_config["applications"][0]["args"]
    assert (args["model"], args["gpus_per_attention_replica"], args["gpus_per_expert_shard"]) == ("demo", 0, 0)
    assert "tiny demo model inside the image" in objects.notes
    for role, pod in objects.pods.items():
        [found] = pod["spec"]["containers"]
        assert "initContainers" not in pod["spec"], role
        assert found["image"] == f"moe-cluster:{cluster.__version__}"
        assert found["resources"]["requests"] == {"cpu": "500m", "memory": "1536Mi"}
        assert "nvidia.com/gpu" not in found["resources"]["limits"]


def test_a_model_of_ones_own_gets_what_it_had_before_there_was_a_default():
    """One GPU a pod and the large pods, and a value that is given changes no other."""
    changes = hub() | {"image.repository": "mine", "groups.attention.resources": {"limits": {"memory": "40Gi"}}}
    pods = rendered(DEFAULT, changes).pods
    found = {role: pod["spec"]["containers"][0]["resources"] for role, pod in pods.items()}
    large = {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    small = {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "8Gi"}}
    assert found == {
        "head": small,
        "ingress": small,
        "attention": {"requests": large, "limits": {"memory": "40Gi", "nvidia.com/gpu": "1"}},
        "experts": {"requests": large, "limits": {"memory": "32Gi", "nvidia.com/gpu": "1"}},
    }
