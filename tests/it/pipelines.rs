//! The shipped pipelines: every variant of every file is valid, and what a user has to bring is said.

use std::{fs, path::Path};

use crate::environment::{Environment, unwrapped};

fn shipped() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let mut files: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path().display().to_string())
        .filter(|path| path.ends_with(".yaml"))
        .collect();
    files.sort();
    files
}

#[test]
fn every_variant_of_every_pipeline_is_valid() {
    let env = Environment::new();
    let files = shipped();
    assert!(files.len() >= 7, "{files:?}");
    for file in files {
        env.ok(&["dag", &file, "--format", "text"]);
        for variant in env.ok(&["variants", &file]).stdout.lines() {
            let name = variant.split_whitespace().next().unwrap();
            env.ok(&["dag", &file, "--variant", name, "--format", "text"]);
        }
    }
}

#[test]
fn the_paper_s_pipelines_plan_without_a_file_at_hand_and_say_what_must_be_brought() {
    let env = Environment::new();
    for (name, archived) in
        [("beauty", false), ("toys", false), ("sports", true), ("cloth_sport", true), ("electronic_phone", true)]
    {
        let file = format!("{}/pipelines/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
        if archived {
            let said = unwrapped(&env.fails(3, &["plan", &file]));
            assert!(said.contains("archive") && said.contains("--set vars.items=PATH"), "{said}");
        } else {
            let output = env.command(&["plan", &file]).env("HF_HUB_OFFLINE", "1").output().unwrap();
            let plan = String::from_utf8_lossy(&output.stdout);
            assert!(plan.contains("never ran") && plan.contains("maybe"), "{plan}");
        }
        for variant in ["lite", "published-tids", "no-neighbors", "no-internalization", "collaborative"] {
            env.ok(&["dag", &file, "--variant", variant]);
        }
    }
}
