//! GPUs without any: a stand-in for the driver's library, and devices that are made up.

use std::{path::PathBuf, process::Command, sync::OnceLock};

use crate::environment::{Environment, Running};

/// The compiled stand-in, or `None` where there is no C compiler.
fn nvml() -> Option<&'static PathBuf> {
    static LIBRARY: OnceLock<Option<PathBuf>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| {
            let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fakes/nvml.c");
            let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
            let library = folder.join(format!("libnvml-{}.so", std::process::id()));
            let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
            if built.is_ok_and(|status| status.success()) {
                return Some(library);
            }
            eprintln!("skipped: no C compiler");
            None
        })
        .as_ref()
}

/// `grlm` on a machine with these lines of GPUs.
fn on(env: &Environment, gpus: &str, arguments: &[&str]) -> Option<Command> {
    env.write("gpus", gpus);
    let mut command = env.command(arguments);
    command.env("GRLM_NVML", nvml()?).env("FAKE_NVML", env.path("gpus")).env("FAKE_NVML_USED", env.path("used"));
    command.env("FAKE_NVML_ASKED", env.path("asked"));
    Some(command)
}

fn said(mut command: Command) -> (i32, String) {
    let output = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap_or(-1), text)
}

const TWO: &str = "GPU-aaaa 81920\nGPU-bbbb 40960\n";

fn stage(run: &str, resources: &str) -> String {
    format!(
        "name: gpu\nstages:\n  s:\n    uses: command\n    pass_env: [FAKE_NVML, FAKE_NVML_USED]\n    resources: {{ {resources} }}\n    with: {{ run: \"{run}\" }}\n    outputs: {{ out: x.txt }}\n"
    )
}

#[test]
fn gpus_and_their_instances_are_found_and_chosen() {
    let env = Environment::new();
    let Some(doctor) = on(&env, TWO, &["doctor"]) else { return };
    let (code, text) = said(doctor);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("gpu0: GPU-aaaa, 80.0 GiB") && text.contains("gpu1: GPU-bbbb, 40.0 GiB"), "{text}");
    let split = "GPU-aaaa 81920\nMIG-1 20480 GPU-aaaa\nMIG-2 40960 GPU-aaaa\nGPU-bbbb 40960\n";
    let (_, text) = said(on(&env, split, &["doctor"]).unwrap());
    assert!(text.contains("gpu0.0: MIG-1") && text.contains("gpu0.1: MIG-2") && !text.contains("gpu0: "), "{text}");
    for (visible, wanted) in [("1", "gpu1"), ("MIG-2", "gpu0.1"), ("GPU-b", "gpu1")] {
        let mut doctor = on(&env, split, &["doctor"]).unwrap();
        doctor.env("CUDA_VISIBLE_DEVICES", visible);
        let (_, text) = said(doctor);
        assert!(text.contains("1 GPU (") && text.contains(&format!("{wanted}: ")), "{visible}: {text}");
    }
    let (code, text) = said(on(&env, TWO, &["doctor", "--devices", "2"]).unwrap());
    assert!(code == 6 && text.contains("there is no GPU 2"), "{text}");
}

#[test]
fn a_stage_sees_the_gpus_that_it_was_leased() {
    let env = Environment::new();
    env.write("gpu.yaml", &stage("echo $CUDA_VISIBLE_DEVICES > ${outputs.out}", "gpus: 1, gpu_memory: 60GiB"));
    let Some(run) = on(&env, TWO, &["run", "gpu.yaml"]) else { return };
    let (code, text) = said(run);
    assert_eq!(code, 0, "{text}");
    assert_eq!(env.read("out/gpu/s/x.txt"), "GPU-aaaa\n", "the only one that is large enough");
}

#[test]
fn without_the_library_nvidia_smi_is_asked() {
    let env = Environment::new();
    env.write("bin/nvidia-smi", "#!/bin/sh\necho 'index, uuid, memory.total [MiB]'\necho '0, GPU-smi, 1024 MiB'\n");
    let script = env.path("bin/nvidia-smi");
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", env.path("bin").display(), std::env::var("PATH").unwrap());
    let mut doctor = env.command(&["doctor"]);
    doctor.env("GRLM_NVML", "/nonexistent.so").env("PATH", path);
    let (code, text) = said(doctor);
    assert!(code == 0 && text.contains("gpu0: GPU-smi, 1.0 GiB"), "{text}");
}

#[test]
fn a_gpu_that_disappears_is_taken_out_and_its_work_goes_elsewhere() {
    let env = Environment::new();
    // The first attempt takes its own first GPU away.
    let run = "echo $CUDA_VISIBLE_DEVICES | cut -d, -f1 >> seen; if [ $(wc -l < seen) -eq 1 ]; then \
               grep -v $(cat seen) $FAKE_NVML > rest; cp rest $FAKE_NVML; exit 1; fi; echo done > ${outputs.out}";
    env.write("gpu.yaml", &stage(run, "gpus: 1"));
    let Some(command) = on(&env, TWO, &["run", "gpu.yaml"]) else { return };
    let (code, text) = said(command);
    assert_eq!(code, 0, "{text}");
    let seen: Vec<String> = env.read("seen").lines().map(str::to_owned).collect();
    assert_eq!(seen.len(), 2, "{text}");
    assert_ne!(seen[0], seen[1]);
    assert!(text.contains(&format!("{} is gone", seen[0])), "{text}");
    env.write("gpu.yaml", &stage(&run.replace("done", "again"), "gpus: 2"));
    std::fs::remove_file(env.path("seen")).unwrap();
    let (code, text) = said(on(&env, TWO, &["run", "gpu.yaml"]).unwrap());
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("needs 2 GPUs, and the machine has 1 GPU"), "{text}");
}

#[test]
fn memory_is_measured_and_the_next_run_takes_that_share() {
    let env = Environment::new();
    env.write("used", "GPU-aaaa 10240\nGPU-bbbb 10240\n");
    // The second look begins when the first one is over.
    let run = "echo $CUDA_VISIBLE_DEVICES > ${outputs.out}; \
               until [ $(cat asked 2>/dev/null | wc -l) -gt 2 ]; do sleep 0.01; done";
    // Where nobody looks, the stage ends with its timeout.
    let patient = stage(run, "gpus: 1, share: true").replace("    with:", "    timeout: 60s\n    with:");
    env.write("gpu.yaml", &patient);
    let Some(command) = on(&env, TWO, &["run", "gpu.yaml"]) else { return };
    let (code, text) = said(command);
    assert_eq!(code, 0, "{text}");
    let (_, text) = said(on(&env, TWO, &["status", "last", "--json"]).unwrap());
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    let peak = status[0]["stages"]["s"]["peak_gpu_memory"].as_u64().unwrap();
    assert_eq!(peak, 10 << 30);
    // Eight such stages on one GPU of 80 GiB: six fit at a time by measure, where one took it whole.
    let plan = ["plan", "gpu.yaml", "--devices", "0", "--from-scratch", "--json"];
    let (_, text) = said(on(&env, TWO, &plan).unwrap());
    let plan: serde_json::Value = serde_json::from_str(&text).unwrap();
    let hours = plan["gpu_hours"].as_f64().unwrap() * 3600.0 / plan["makespan"].as_f64().unwrap();
    assert!(hours > 0.1 && hours < 0.2, "a share, not the whole: {text}");
}

#[test]
fn a_share_that_was_too_small_grows_and_that_is_remembered() {
    let env = Environment::new();
    env.write("used", "GPU-aaaa 61440\n");
    let run = "echo $CUDA_VISIBLE_DEVICES >> seen; if [ $(wc -l < seen) -lt 3 ]; then echo CUDA out of memory; exit 1; fi; echo done > ${outputs.out}";
    env.write("gpu.yaml", &stage(run, "gpus: 1, gpu_memory: 10GiB"));
    let Some(command) = on(&env, "GPU-aaaa 81920\n", &["run", "gpu.yaml"]) else { return };
    let (code, text) = said(command);
    assert_eq!(code, 0, "{text}");
    assert_eq!(env.read("seen").lines().count(), 3, "at 10, 20 and 40 GiB");
    let (_, text) = said(
        on(&env, "GPU-aaaa 81920\n", &["plan", "gpu.yaml", "--devices", "0", "--from-scratch", "--json"]).unwrap(),
    );
    let plan: serde_json::Value = serde_json::from_str(&text).unwrap();
    let share = plan["gpu_hours"].as_f64().unwrap() * 3600.0 / plan["makespan"].as_f64().unwrap();
    assert!((share - 0.5).abs() < 1e-6, "it begins with what fitted: {share}");
}

#[test]
fn two_runs_never_share_a_gpu_by_accident() {
    let env = Environment::new();
    let run = "mkdir lock && sleep 0.4 && rmdir lock && echo done > ${outputs.out}";
    env.write("a.yaml", &stage(run, "gpus: 1"));
    env.write("b.yaml", &stage(&run.replace("done", "other"), "gpus: 1"));
    let Some(first) = on(&env, "GPU-aaaa 81920\n", &["run", "a.yaml"]) else { return };
    let children: Vec<_> = [first, on(&env, "GPU-aaaa 81920\n", &["run", "b.yaml"]).unwrap()]
        .into_iter()
        .map(|mut command| Running::start(&mut command))
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success(), "both were on the GPU at once");
    }
}

#[test]
fn a_sweep_is_played_on_devices_before_anyone_pays_for_it() {
    let env = Environment::new();
    env.write(
        "sweep.yaml",
        r#"
name: sweep
stages:
  prepare:
    uses: command
    with: { run: "echo > ${outputs.out}" }
    outputs: { out: x.txt }
  train:
    uses: command
    inputs: { a: prepare }
    resources: { gpus: 1 }
    env: [LR]
    with: { run: "echo 1 > ${outputs.out}" }
    outputs: { out: x.txt }
variants:
  lr: { matrix: { train.with.run: ["echo 1", "echo 2", "echo 3", "echo 4", "echo 5", "echo 6", "echo 7", "echo 8"] } }
"#
        .replace("echo 1 > ${outputs.out}", "echo 0")
        .as_str(),
    );
    let plan = [
        "plan",
        "sweep.yaml",
        "--sweep",
        "lr",
        "--devices",
        "sim:4x80GiB",
        "--duration",
        "prepare=10s",
        "--duration",
        "train=1h",
        "--json",
    ];
    let foretold: serde_json::Value = serde_json::from_str(&env.ok(&plan).stdout).unwrap();
    assert_eq!(foretold["makespan"], 7210.0);
    assert_eq!(foretold["gpu_hours"], 8.0);
    assert_eq!(foretold["spans"].as_array().unwrap().len(), 9);
    let text = env.ok(&plan[..plan.len() - 1]).stdout;
    assert!(text.contains("2 h 00 min") && text.contains("sim3"), "{text}");
    let unknown = env.ok(&["plan", "sweep.yaml", "--devices", "sim:1x80GiB"]).stdout;
    assert!(unknown.contains("time not known, so counted as nothing: prepare, train"), "{unknown}");
}

#[test]
fn a_time_from_another_pipeline_counts_for_inputs_of_its_size_alone() {
    let env = Environment::new();
    let pipeline = |name: &str| {
        format!(
            "name: {name}\nstages:\n  s:\n    uses: command\n    inputs: {{ text: {{ file: {name}.txt }} }}\n    \
             with: {{ run: 'wc -c < ${{inputs.text}} > ${{outputs.out}}' }}\n    outputs: {{ out: x.txt }}\n"
        )
    };
    for (name, bytes) in [("small", 100), ("like", 150), ("large", 1000)] {
        env.write(&format!("{name}.yaml"), &pipeline(name));
        env.write(&format!("{name}.txt"), &"x".repeat(bytes));
    }
    env.ok(&["run", "small.yaml"]);
    let unknown = |file: &str| {
        env.ok(&["plan", file, "--devices", "sim:1x80GiB"]).stdout.contains("time not known, so counted as nothing: s")
    };
    assert!(!unknown("like.yaml") && unknown("large.yaml"));
}
