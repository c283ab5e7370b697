//! Kills, and several `grlm` at once.

use std::{fs, process::Command, thread, time::Duration};

use crate::environment::{Environment, Running, three, wait_until};

/// A chain and a fan of short stages, each with a background child that must not outlive the run.
fn short_stages(env: &Environment) {
    let mut text = String::from("name: short\nstages:\n");
    for i in 0..8 {
        text.push_str(&format!("  s{i}:\n    uses: command\n"));
        if i > 0 {
            text.push_str(&format!("    inputs: {{ a: s{}.out }}\n", (i - 1) / 2));
        }
        let read = if i > 0 { "cat ${inputs.a};" } else { "" };
        text.push_str(&format!(
            "    with: {{ run: \"(sleep 987{i} & ) ; sleep 0.0{i}; {{ {read} echo line {i}; seq 2000; }} > ${{outputs.out}}\" }}\n    outputs: {{ out: s{i}.txt }}\n"
        ));
    }
    env.write("short.yaml", &text);
}

/// Processes whose command line mentions `marker` and whose working folder is `env`'s.
fn left_behind(env: &Environment, marker: &str) -> usize {
    let root = fs::canonicalize(env.path(".")).unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&command).contains(marker)
                && fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == root)
        })
        .count()
}

fn wait_until_none_is_left(env: &Environment, marker: &str) {
    wait_until("no process outlives the run", || left_behind(env, marker) == 0);
}

#[test]
fn killed_at_any_moment_it_leaves_no_process_and_the_next_run_finishes_alike() {
    let undisturbed = Environment::new();
    short_stages(&undisturbed);
    undisturbed.ok(&["run", "short.yaml"]);
    let wanted: Vec<_> = undisturbed.tree("out").into_iter().map(|(_, content)| content).collect();
    wait_until_none_is_left(&undisturbed, "987");

    let kills = std::env::var("GRLM_TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    for round in 0..kills {
        let env = Environment::new();
        short_stages(&env);
        let mut child = Running::start(&mut env.command(&["run", "short.yaml"]));
        thread::sleep(Duration::from_millis(round * 700 / kills));
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until_none_is_left(&env, "987");
        wait_until_none_is_left(&env, "__worker");
        env.ok(&["run", "short.yaml"]);
        let found: Vec<_> = env.tree("out").into_iter().map(|(_, content)| content).collect();
        assert!(found == wanted, "round {round}: different results");
    }
}

#[test]
fn interrupted_once_it_stops_its_stages_and_says_so() {
    let env = Environment::new();
    env.write(
        "long.yaml",
        r#"
name: long
stages:
  wait:
    uses: command
    with: { run: "trap 'echo saved > saved.txt; exit 1' TERM; touch started; sleep 9876 & wait $!; echo > ${outputs.out}" }
    outputs: { out: x.txt }
"#,
    );
    let mut child = Running::start(&mut env.command(&["run", "long.yaml"]));
    wait_until("the stage starts", || env.path("started").exists());
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(env.read("saved.txt"), "saved\n");
    wait_until_none_is_left(&env, "9876");
}

#[test]
fn several_at_once_on_one_store_run_each_stage_once() {
    let env = three();
    let text = env.read("three.yaml").replace("tr a-z A-Z <", "sleep 0.3; tr a-z A-Z <");
    env.write("three.yaml", &text);
    let children: Vec<_> = (0..4).map(|_| Running::start(&mut env.command(&["run", "three.yaml"]))).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(env.ran(), ["count", "other", "upper"]);
}
