"""``diffattn doctor``, of an installation that works and of many that are broken."""

import importlib.metadata as metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub.constants
import imageio_ffmpeg
import pytest
import torch

from diffattn import CLEARAttn, DenseAttn, Method, SolAttn, VMoBAAttn
from diffattn.methods import METHODS, Site
from diffattn.pipelines.doctor import backends, devices, disk, models, numerics, versions
from diffattn.pipelines.doctor.findings import SECTIONS, Finding, broken, examine
from diffattn.pipelines.doctor.report import section_lines, summary, to_dict

CPU = torch.device("cpu")
GIB = 1 << 30


def about(section, subject):
    """The findings of a section about a subject."""
    return [finding for finding in examine(section) if finding.subject == subject]


def the(section, subject):
    (finding,) = about(section, subject)
    return finding


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    """The tests run in Triton's interpreter; users do not."""
    for name in ("TRITON_INTERPRET", "DIFFATTN_BACKEND", "CUDA_VISIBLE_DEVICES", "CXX"):
        monkeypatch.delenv(name, raising=False)


class TestReport:
    def test_an_installation_that_works(self, diffattn, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(numerics, "_SECONDS", {"cpu": 300.0})  # other tests run beside this one
        result = diffattn("doctor", "--json")
        found = json.loads(result.out)
        assert (result.code, found["problems"]) == (0, 0), result.out
        assert list(found["sections"]) == list(SECTIONS)
        for findings in found["sections"].values():
            for finding in findings:
                assert set(finding) == {"status", "subject", "said", "advice"}
                assert bool(finding["advice"]) == (finding["status"] != "ok")
        (methods,) = (x for x in found["sections"]["numerics"] if x["subject"] == "methods")
        checked = methods["said"].partition(" equal dense float64 on cpu")[0].split(", ")
        assert set(checked) == set(METHODS)
        assert list(tmp_path.iterdir()) == []

    def test_problems_are_exit_code_1(self, diffattn, monkeypatch):
        monkeypatch.setattr(
            "diffattn.pipelines.doctor.report.examine",
            lambda section: [Finding("problem", section, "is broken", "mend it")],
        )
        result = diffattn("doctor")
        assert result.code == 1
        lines = result.out.splitlines()
        assert lines[:3] == [
            "versions",
            "  PROBLEM  versions: is broken",
            "           -> mend it",
        ]
        assert lines[-1] == "8 problems: what to do stands after ->"

    def test_warnings_are_exit_code_0(self, diffattn, monkeypatch):
        monkeypatch.setattr(
            "diffattn.pipelines.doctor.report.examine",
            lambda section: [Finding("warning", section, "is slow", "wait")],
        )
        assert diffattn("doctor").code == 0

    @pytest.mark.parametrize(
        ("statuses", "line"),
        [
            (["ok"], "everything works"),
            (["ok", "warning"], "1 warning: what to do stands after ->"),
            (["problem", "warning", "warning"], "1 problem and 2 warnings: what to do stands"),
        ],
    )
    def test_the_last_line(self, statuses, line):
        report = {"a": [Finding(status, "x", "y", "z") for status in statuses]}
        assert summary(report).startswith(line)
        assert to_dict(report)["warnings"] == statuses.count("warning")

    def test_lines_of_what_works(self):
        assert list(section_lines("disk", [Finding("ok", "outputs", "here")])) == [
            "disk",
            "  ok       outputs: here",
        ]

    @pytest.mark.parametrize("module", ["torch", "numpy", "diffusers", "huggingface_hub"])
    def test_the_report_survives_a_module_that_cannot_be_imported(self, module, tmp_path):
        code = (
            f"import sys; sys.modules[{module!r}] = None\n"
            "from diffattn.pipelines import cli; sys.exit(cli.run(['doctor', '--json']))"
        )
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        found = json.loads(done.stdout)
        assert list(found["sections"]) == list(SECTIONS)
        name = module.replace("_", "-")
        (about,) = (x for x in found["sections"]["versions"] if x["subject"] == name)
        assert about["status"] == "problem"
        assert "cannot be imported: ModuleNotFoundError" in about["said"]
        assert about["advice"].startswith(f"pip install --force-reinstall '{name}>=")

    def test_a_section_that_cannot_be_loaded(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "diffattn.pipelines.doctor.disk", None)
        (finding,) = examine("disk")
        assert (finding.status, finding.subject) == ("problem", "disk")

    @pytest.mark.parametrize(
        ("module", "name"), [("PIL.Image", "pillow"), ("cv2", "opencv-python"), ("rich", "rich")]
    )
    def test_what_to_install_for_a_missing_module(self, module, name):
        error = ModuleNotFoundError(f"No module named {module!r}", name=module)
        assert broken("x", error).advice == f"pip install {name}"

    def test_a_check_that_raises_stops_no_other(self, monkeypatch):
        def check_one():
            yield Finding("ok", "one", "is there")
            raise OSError("a disk is gone")

        def check_two_things():
            raise KeyError("x")

        monkeypatch.setattr(disk, "CHECKS", (check_one, check_two_things, disk.check_folders))
        found = examine("disk")
        assert [x.status for x in found[:3]] == ["ok", "problem", "problem"]
        assert found[1].said == "OSError: a disk is gone"
        assert found[2].subject == "two things"
        assert len(found) > 4

    def test_what_libraries_print_is_not_in_the_report(self, diffattn, monkeypatch):
        def check_chatter():
            print("Install it via command:")
            yield Finding("ok", "x", "y")

        monkeypatch.setattr(disk, "CHECKS", (check_chatter,))
        monkeypatch.setattr("diffattn.pipelines.doctor.report.SECTIONS", {"disk": "disk"})
        result = diffattn("doctor", "--json")
        assert json.loads(result.out)["problems"] == 0
        assert "Install it via command:" in result.err

    def test_interrupts_end_the_command(self, diffattn, monkeypatch):
        def interrupt():
            raise KeyboardInterrupt

        monkeypatch.setattr(disk, "CHECKS", (interrupt,))
        monkeypatch.setattr("diffattn.pipelines.doctor.report.SECTIONS", {"disk": "disk"})
        assert diffattn("doctor").code == 130


class TestVersions:
    @pytest.fixture
    def version_of(self, monkeypatch):
        """Let a distribution have another version; None for none."""
        real = metadata.version

        def change(name, version):
            def found(asked):
                if asked != name:
                    return real(asked)
                if version is None:
                    raise metadata.PackageNotFoundError(asked)
                return version

            monkeypatch.setattr(metadata, "version", found)

        return change

    @pytest.fixture
    def no_import(self, monkeypatch):
        """Let a module's import fail."""
        real = versions.import_module

        def change(name, error):
            def found(asked):
                if asked == name:
                    raise error
                return real(asked)

            monkeypatch.setattr(versions, "import_module", found)

        return change

    def test_an_old_diffusers(self, version_of):
        version_of("diffusers", "0.30.0")
        assert the("versions", "diffusers") == Finding(
            "problem",
            "diffusers",
            "0.30.0 is installed, but >=0.36 is needed",
            "pip install --upgrade 'diffusers>=0.36'",
        )

    def test_releases_before_a_release_count(self, version_of):
        version_of("torch", "2.14.0.dev20261101+cu130")
        assert the("versions", "torch").status == "ok"

    def test_a_missing_package(self, version_of, monkeypatch):
        version_of("peft", None)
        monkeypatch.setattr(versions, "find_spec", lambda name: None)
        assert the("versions", "peft").said == "is not installed, but >=0.17 is needed"

    def test_a_module_of_another_distribution(self, version_of):
        version_of("opencv-python", None)
        assert the("versions", "opencv-python") == Finding(
            "ok", "opencv-python", "module cv2 of another distribution"
        )

    def test_a_broken_triton_without_a_gpu(self, no_import):
        no_import("triton", ImportError("libtriton.so: undefined symbol"))
        found = the("versions", "triton")
        assert found.status == "warning"
        assert "cannot be imported: ImportError: libtriton.so: undefined symbol" in found.said
        assert "on the CPU nothing is missing" in found.said

    def test_a_broken_triton_with_a_gpu(self, no_import, monkeypatch):
        no_import("triton", OSError("libcuda.so.1: cannot open shared object file"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        found = the("versions", "triton")
        assert found.status == "problem"
        assert found.advice == "pip install --force-reinstall 'triton>=3.6'"

    def test_an_old_python(self, monkeypatch):
        monkeypatch.setattr("platform.python_version", lambda: "3.9.18")
        found = the("versions", "python")
        assert (found.status, found.said) == ("problem", "3.9.18, but >=3.11 is needed")

    def test_a_checkout_that_is_not_installed(self, monkeypatch):
        def missing(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "metadata", missing)
        assert [x.subject for x in examine("versions")] == ["python", "diffattn"]
        assert the("versions", "diffattn").status == "warning"
        assert examine("optional packages") == []

    def test_without_packaging(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "packaging.requirements", None)
        found = the("versions", "packages")
        assert (found.status, found.advice) == ("problem", "pip install packaging")


class TestDevices:
    @pytest.fixture
    def gpu(self, monkeypatch):
        """Let torch report a GPU; returns its properties, which tests may change."""
        properties = SimpleNamespace(
            name="NVIDIA H100", major=9, minor=0, free=70 * GIB, total=80 * GIB, answer=2.0
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda _: (properties.free, properties.total)
        )
        ones = torch.ones
        monkeypatch.setattr(
            torch, "ones", lambda *size, device=None: ones(*size) * (properties.answer - 1)
        )
        monkeypatch.setattr(devices, "_driver", lambda: ["NVIDIA H100, 580.65.06"])
        return properties

    def test_a_gpu(self, gpu):
        assert [x.status for x in examine("devices")] == ["ok"] * 3
        assert the("devices", "driver").said == "NVIDIA 580.65.06"
        said = "NVIDIA H100, compute capability 9.0, 70.0 GiB of 80.0 GiB free"
        assert the("devices", "cuda:0").said == said

    def test_a_gpu_that_is_reported_but_fails(self, gpu, monkeypatch):
        def fail(_):
            raise RuntimeError("CUDA error: no kernel image\nCompile with TORCH_USE_CUDA_DSA")

        monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
        found = the("devices", "cuda:0")
        assert found.status == "problem"
        assert found.said.startswith(
            "torch reports it, but it fails: RuntimeError: CUDA error: no kernel image Compile"
        )
        assert "nvidia-smi" in found.advice

    def test_a_gpu_that_computes_wrong_numbers(self, gpu):
        gpu.answer = 3.5
        assert the("devices", "cuda:0").said == "1 + 1 is not 2 there"

    def test_an_old_gpu(self, gpu):
        gpu.major, gpu.minor = 7, 5
        assert the("devices", "cuda:0").status == "warning"

    def test_a_gpu_that_others_fill(self, gpu):
        gpu.free = 1 << 20
        found = the("devices", "cuda:0")
        assert (found.status, "nvidia-smi" in found.advice) == ("warning", True)

    @pytest.fixture
    def driver_alone(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(devices, "_driver", lambda: ["NVIDIA L4, 550.1"])

    def test_a_torch_for_the_cpu_on_a_machine_with_a_gpu(self, driver_alone, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        found = the("devices", "gpu")
        assert (
            found.said
            == f"the driver sees NVIDIA L4, 550.1, but torch {torch.__version__} does not"
        )
        assert (found.status, "built for the CPU" in found.advice) == ("warning", True)

    def test_a_hidden_gpu(self, driver_alone, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        assert "CUDA_VISIBLE_DEVICES is '7'" in the("devices", "gpu").advice

    def test_an_old_driver(self, driver_alone, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        assert the("devices", "gpu").advice == "the driver may be too old for CUDA 13.0: update it"

    def test_an_accelerator_without_kernels(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(devices, "_driver", list)
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda **_: torch.device("mps")
        )
        found = the("devices", "gpu")
        assert (found.status, found.said) == ("warning", "mps has no sparse kernels")

    @pytest.mark.parametrize(
        ("script", "found"),
        [
            ("echo 'NVIDIA L4, 550.1'; echo 'NVIDIA L4, 550.1'", ["NVIDIA L4, 550.1"] * 2),
            ("echo 'has failed because it could not communicate'; exit 9", []),
        ],
    )
    def test_the_driver_is_asked(self, tmp_path, monkeypatch, script, found):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        assert devices._driver() == found

    def test_without_nvidia_smi(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert devices._driver() == []

    def test_little_memory(self, monkeypatch):
        monkeypatch.setattr(devices, "free_memory", lambda device: 1 << 20)
        assert the("devices", "cpu").status == "warning"
        monkeypatch.setattr(devices, "free_memory", lambda device: None)
        assert the("devices", "cpu").status == "ok"


class TestBackends:
    def test_wrong_numbers(self, monkeypatch):
        real = backends.attention
        monkeypatch.setattr(backends, "attention", lambda *x, **y: real(*x, **y) * 1.01)
        found = the("backends", "cpu")
        assert found.status == "problem"
        assert (
            "computes wrong numbers on cpu: the output and gradients is off by 0.01" in found.said
        )

    def test_nan(self, monkeypatch):
        real = backends.attention
        monkeypatch.setattr(backends, "attention", lambda *x, **y: real(*x, **y) * float("nan"))
        assert "off by inf" in the("backends", "cpu").said

    def test_a_kernel_that_fails(self, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("out of resource: shared memory")

        monkeypatch.setattr(backends, "attention", fail)
        assert "fails on cpu: RuntimeError: out of resource" in the("backends", "cpu").said

    def test_a_gpu_whose_triton_cannot_be_imported(self, monkeypatch):
        """A device that fails at once serves for the GPU: there is none here."""
        monkeypatch.setattr(backends, "_gpu", lambda: CPU)
        monkeypatch.setitem(sys.modules, "triton", None)
        found = the("backends", "triton")
        assert found.status == "problem"
        assert "fails on cpu: ImportError: backend 'triton' needs Triton" in found.said

    def test_a_gpu_that_is_reported_but_fails(self, monkeypatch):
        if torch.cuda.is_available():
            pytest.skip("there is one")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        found = examine("backends")
        failed = [x.subject for x in found if x.status == "problem"]
        assert failed == ["triton", "flex"]

    def test_the_interpreter(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(backends, "_gpu", lambda: None)
        assert the("backends", "triton").status == "ok"
        monkeypatch.setattr(backends, "_gpu", lambda: CPU)
        found = backends.check_triton()
        assert next(found).advice == "unset TRITON_INTERPRET"

    def test_no_compiler(self, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda name: None)
        monkeypatch.setattr(backends, "_gpu", lambda: None)
        found = the("backends", "flex")
        assert (found.status, found.said[:16]) == ("warning", "no C++ compiler:")

    def test_a_compiler_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(backends, "_gpu", lambda: None)
        monkeypatch.setenv("CXX", "/nowhere/c++")
        assert the("backends", "flex").said.startswith("no C++ compiler /nowhere/c++: ")

    def test_a_backend_that_the_environment_chooses(self, monkeypatch):
        monkeypatch.setenv("DIFFATTN_BACKEND", "reference")
        found = the("backends", "DIFFATTN_BACKEND")
        assert found.said == "is set: every sparse attention is computed by 'reference'"

    def test_an_unknown_backend_in_the_environment(self, monkeypatch):
        monkeypatch.setenv("DIFFATTN_BACKEND", "tirton")
        found = the("backends", "DIFFATTN_BACKEND")
        assert found.status == "problem"
        assert found.said.startswith("unknown backend 'tirton'; choose from")

    def test_a_diffusers_that_attaching_does_not_fit(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "diffattn.attach.attachment", None)
        assert the("backends", "attaching").status == "problem"


@dataclass(frozen=True, kw_only=True)
class Copying(Method):
    """A method without a definition that doctor knows."""

    type: ClassVar[str] = "copying"

    def for_model(self, family, grid=None):
        return self

    def attend(self, query, key, value, site, *, scale=None, key_mask=None):
        return value


class TestNumerics:
    @pytest.fixture
    def only(self, monkeypatch):
        def change(*kinds):
            monkeypatch.setattr(
                numerics, "all_methods", lambda: {kind.type: kind for kind in kinds}
            )

        return change

    @pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
    def test_definitions_are_not_those_of_dense_attention(self, name, monkeypatch):
        """At the size of the check the methods leave something out, or the check were empty."""
        method = METHODS[name](**numerics._SPARSE.get(name, {}))
        error = numerics.error_of(method, CPU)
        assert error is not None
        assert error < 1e-5
        dense = DenseAttn()
        monkeypatch.setattr(
            numerics, "attention_call", lambda case, shape, device: partial(attend, shape.grid)
        )

        def attend(grid, q, k, v):
            return dense.attend(q, k, v, Site("", 0, 1, grid))

        assert numerics.error_of(method, CPU) > backends.ALLOWED[torch.float32]

    def test_a_method_that_is_wrong(self, only, monkeypatch):
        only(VMoBAAttn, DenseAttn)
        real = VMoBAAttn.attend
        monkeypatch.setattr(VMoBAAttn, "attend", lambda *x, **y: real(*x, **y) * 1.02)
        found = {x.subject: x for x in examine("numerics")}
        assert found["vmoba"].status == "problem"
        assert "computes wrong numbers on cpu: off by 0.02" in found["vmoba"].said
        assert found["methods"].said.startswith("dense equal dense float64 on cpu")

    def test_a_method_that_fails(self, only, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("illegal memory access")

        only(SolAttn)
        monkeypatch.setattr(SolAttn, "attend", fail)
        (found,) = examine("numerics")
        assert (found.status, found.subject) == ("problem", "sol")
        assert found.said == "fails on cpu: RuntimeError: illegal memory access"

    def test_methods_of_others_are_named(self, only):
        only(Copying)
        (found,) = examine("numerics")
        assert (found.status, found.said) == ("ok", "copying: no definition is known here")

    def test_what_does_more_than_its_mask_has_no_definition_here(self):
        assert numerics.error_of(CLEARAttn(down_factor=2), CPU) is None

    def test_the_time_is_limited(self, only, monkeypatch):
        only(DenseAttn, SolAttn)
        monkeypatch.setattr(numerics, "_SECONDS", {"cpu": -1.0})
        (found,) = examine("numerics")
        assert found.status == "warning"
        assert found.said == "dense, sol: -1 s were over"


class TestVideoTools:
    def test_no_ffmpeg(self, monkeypatch):
        def missing():
            raise RuntimeError("No ffmpeg exe could be found")

        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
        found = {x.subject: x for x in examine("ffmpeg")}
        assert found["ffmpeg"].said == "no ffmpeg was found"
        assert "IMAGEIO_FFMPEG_EXE" in found["ffmpeg"].advice
        assert found[".mp4"].status == "problem"
        assert found[".gif"].status == "ok"

    def test_an_ffmpeg_that_is_no_program(self, tmp_path, monkeypatch):
        (tmp_path / "ffmpeg").write_text("")
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
        assert "cannot start" in the("ffmpeg", "ffmpeg").said

    def test_an_ffmpeg_without_h264(self, fake_ffmpeg):
        fake_ffmpeg(
            'case "$*" in *libx264*) echo "Unknown encoder \'libx264\'" >&2; exit 8;; esac\n'
            'exec "$real" "$@"'
        )
        found = {x.subject: x for x in examine("ffmpeg")}
        assert found["ffmpeg"].status == "ok"
        assert found[".mp4"].status == "problem"
        assert "Unknown encoder 'libx264'" in found[".mp4"].said

    def test_an_ffmpeg_without_many_parts(self, fake_ffmpeg):
        fake_ffmpeg(
            'case "$*" in\n'
            "*-decoders*) echo ' V....D h264  H.264'; echo ' V....D libdav1d  AV1';;\n"
            "*-filters*) echo ' ... scale  V->V';;\n"
            '*) exec "$real" "$@";; esac'
        )
        found = [x for x in examine("ffmpeg") if x.subject in ("decoders", "filters")]
        assert [(x.status, x.said) for x in found] == [
            ("ok", "H.264, AV1"),
            (
                "warning",
                "no HEVC, VP9, MPEG-4, ProRes: clips in it cannot be read for training",
            ),
            ("warning", "no VMAF, XPSNR: it cannot be measured"),
        ]


class TestDisk:
    def room(self, monkeypatch, free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    @pytest.mark.parametrize(
        ("free", "status"), [(0, "problem"), (GIB // 2, "warning"), (2 * GIB, "ok")]
    )
    def test_room(self, monkeypatch, free, status):
        self.room(monkeypatch, free)
        assert the("disk", "outputs").status == status

    def test_weights_need_more(self, monkeypatch):
        self.room(monkeypatch, 2 * GIB)
        found = the("disk", "models")
        assert (found.status, "20.0 GiB may be needed" in found.advice) == ("warning", True)

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (PermissionError(13, "Permission denied"), "cannot be written to: Permission denied"),
            (OSError(28, "No space left on device"), "cannot be written to: No space left on"),
            (OSError(30, "Read-only file system"), "cannot be written to: Read-only file system"),
        ],
    )
    def test_what_cannot_be_written(self, monkeypatch, tmp_path, error, words):
        def fail(**_):
            raise error

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", fail)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        found = the("disk", "compiled kernels")
        assert found.status == "problem"
        assert found.said.startswith(f"{tmp_path / 'cache'} {words}")
        assert "TRITON_CACHE_DIR" in found.advice

    def test_a_folder_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        folder = disk.Folder("outputs", tmp_path / "file" / "in", GIB, "--output")
        assert "Not a directory" in disk.examined(folder).said

    def test_nothing_is_made_and_nothing_is_left(self, tmp_path):
        assert disk.examined(disk.Folder("x", tmp_path / "a" / "b", 1, "X")).status == "ok"
        assert list(tmp_path.iterdir()) == []

    def test_the_other_folders_without_the_hub(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub.constants", None)
        assert [x.subject for x in examine("disk")] == [
            "outputs", "temporary files", "compiled kernels", "folders",
        ]  # fmt: skip


class TestModels:
    def test_offline_with_an_empty_cache(self, monkeypatch, tmp_path):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
        found = the("models", "hub")
        assert found.said == "offline (HF_HUB_OFFLINE), and the cache has no model"

    @pytest.mark.parametrize("offline", [True, False])
    def test_models_in_the_cache(self, monkeypatch, tmp_path, offline):
        for number in range(7):
            (tmp_path / f"models--org--model-{number}").mkdir()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        found = the("models", "hub")
        assert found.status == "ok"
        assert found.said.startswith("offline") == offline
        assert "7 models in the cache (org/model-0, " in found.said
        assert "org/model-4 and 2 more)" in found.said

    @pytest.mark.parametrize("content", [None, b"version https://git-lfs.github.com/spec/v1"])
    def test_a_checkout_without_weights(self, monkeypatch, tmp_path, content):
        if content is not None:
            (tmp_path / "model.safetensors").write_bytes(content)
        monkeypatch.setattr(models, "find_model", lambda name: tmp_path)
        assert the("models", "moving-shapes").said == f"{tmp_path} has no weights"


class TestOptional:
    @pytest.fixture
    def extras(self, monkeypatch):
        """Let diffattn have two extras; versions are given by name."""

        def change(**installed):
            def version(name):
                if name not in installed:
                    raise metadata.PackageNotFoundError(name)
                return installed[name]

            about = SimpleNamespace(get_all=lambda _: ["dev", "logs"])
            lines = ["torch>=2", 'wandb>=0.17; extra == "logs"', 'ruff; extra == "dev"']
            monkeypatch.setattr(metadata, "metadata", lambda _: about)
            monkeypatch.setattr(metadata, "requires", lambda _: lines)
            monkeypatch.setattr(metadata, "version", version)

        return change

    @pytest.mark.parametrize(
        ("installed", "status", "said"),
        [
            ({}, "ok", "not installed (pip install 'diffattn[logs]' brings it)"),
            ({"wandb": "0.18"}, "ok", "0.18"),
            ({"wandb": "0.16.2"}, "warning", "0.16.2 is installed, but >=0.17 is needed"),
        ],
    )
    def test_packages_of_an_extra(self, extras, installed, status, said):
        extras(**installed)
        (found,) = examine("optional packages")
        assert (found.subject, found.status, found.said) == ("wandb", status, said)


@pytest.mark.gpu
@pytest.mark.parametrize("section", ["devices", "backends", "numerics"])
def test_a_gpu_that_works(section):
    assert [x for x in examine(section) if x.status == "problem"] == []
