//! Partial runs and overrides.

use crate::environment::{three, unwrapped};

#[test]
fn until_runs_a_stage_and_what_it_needs() {
    let env = three();
    env.ok(&["run", "three.yaml", "--until", "upper"]);
    assert_eq!(env.ran(), ["upper"]);
}

#[test]
fn only_needs_its_inputs_to_be_there() {
    let env = three();
    let error = env.fails(1, &["run", "three.yaml", "--only", "count"]);
    assert!(error.contains("upper"), "{error}");
    env.ok(&["run", "three.yaml", "--until", "upper"]);
    env.ran();
    env.ok(&["run", "three.yaml", "--only", "count"]);
    assert_eq!(env.ran(), ["count"]);
}

#[test]
fn from_runs_a_stage_and_what_depends_on_it() {
    let env = three();
    env.ok(&["run", "three.yaml", "--until", "upper"]);
    env.ran();
    env.ok(&["run", "three.yaml", "--from", "count"]);
    assert_eq!(env.ran(), ["count"]);
}

#[test]
fn force_runs_a_stage_again_and_an_equal_result_stops_there() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    env.ok(&["run", "three.yaml", "--force", "upper"]);
    assert_eq!(env.ran(), ["upper"]);
}

#[test]
fn set_overrides_a_value_for_one_run() {
    let env = three();
    env.write("b.txt", "bee\n");
    env.ok(&["run", "three.yaml", "--set", "vars.source=b.txt"]);
    assert_eq!(env.read("out/three/upper/upper.txt"), "BEE\n");
    let error = env.fails(3, &["run", "three.yaml", "--set", "vars.sauce=b.txt"]);
    assert!(error.contains("source"), "{error}");
}

#[test]
fn an_unknown_stage_name_is_answered_with_the_nearest() {
    let env = three();
    let error = env.fails(3, &["run", "three.yaml", "--until", "uper"]);
    assert!(error.contains("upper"), "{error}");
}

#[test]
fn a_forced_stage_that_was_not_chosen_is_a_mistake() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    for forced in ["count", "upper"] {
        let chosen = if forced == "count" { "upper" } else { "count" };
        let said = unwrapped(&env.fails(2, &["run", "three.yaml", "--only", chosen, "--force", forced]));
        assert!(said.contains(&format!("`--force {forced}`")) && said.contains("`--only` chose"), "{said}");
    }
    assert!(env.ran().is_empty());
    env.ok(&["run", "three.yaml", "--only", "count", "--force", "count"]);
    assert_eq!(env.ran(), ["count"]);
}
