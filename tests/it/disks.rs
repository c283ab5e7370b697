//! Disks that are full or cannot be written. They are made in a mount namespace of the test's own, which needs no rights
//! where user namespaces are allowed; elsewhere the tests say that they were skipped.

use std::process::Command;

use crate::environment::{Environment, Outcome, three, unwrapped};

/// Runs a shell script, in which `$GRLM` is the program, where it may mount.
fn mounting(env: &Environment, script: &str) -> Option<Outcome> {
    let allowed = Command::new("unshare").args(["-rm", "sh", "-c", "mount -t tmpfs tmpfs /tmp"]).output();
    if !allowed.is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: no mount namespaces here");
        return None;
    }
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-ec", script])
        .current_dir(env.path("."))
        .env("GRLM", env!("CARGO_BIN_EXE_grlm"))
        .env("GRLM_LEASES", env.path("leases"))
        .env("NO_COLOR", "1")
        .output()
        .expect("unshare starts");
    Some(Outcome::from(output))
}

#[test]
fn a_stage_that_fills_the_disk_fails_cleanly_and_runs_once_there_is_space() {
    let env = Environment::new();
    env.write(
        "big.yaml",
        r#"
name: big
stages:
  big:
    uses: command
    with: { run: "head -c 3000000 /dev/zero > ${outputs.out}" }
    outputs: { out: big.bin }
"#,
    );
    let script = "mkdir .grlm; mount -t tmpfs -o size=2m tmpfs .grlm
        set +e; $GRLM run big.yaml; echo first $?; ls .grlm/actions | wc -l; ls out 2>/dev/null | wc -l
        mount -o remount,size=32m .grlm; $GRLM run big.yaml; echo second $?; wc -c < out/big/big/big.bin";
    let Some(Outcome { stdout, stderr, .. }) = mounting(&env, script) else { return };
    // The log is on that disk too, so it may not tell.
    assert!(unwrapped(&stderr).contains("the disk of the store is full"), "{stderr}");
    assert_eq!(
        stdout.lines().filter(|l| !l.starts_with("results")).collect::<Vec<_>>(),
        ["first 1", "0", "0", "second 0", "3000000"]
    );
}

#[test]
fn a_store_on_a_full_disk_is_an_error_and_never_a_silent_success() {
    let env = three();
    let script =
        "mkdir .grlm; mount -t tmpfs -o size=1m tmpfs .grlm; $GRLM run three.yaml --until upper >/dev/null 2>&1
        head -c 2000000 /dev/zero > .grlm/filler 2>/dev/null || true
        set +e; $GRLM run three.yaml; echo code $?; rm .grlm/filler; $GRLM run three.yaml --quiet; echo then $?
        cat out/three/count/count.txt";
    let Some(Outcome { stdout, stderr, .. }) = mounting(&env, script) else { return };
    let said = unwrapped(&stderr);
    assert!(said.contains("No space left on device") && said.contains("space left on the disk"), "{stderr}");
    assert!(stdout.contains("code 4\n") && stdout.contains("then 0\n6"), "{stdout}");
}

#[test]
fn a_read_only_store_can_be_planned_from_and_says_why_it_cannot_be_run_on() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    let script = "mount --bind .grlm .grlm; mount -o remount,bind,ro .grlm
        $GRLM plan three.yaml; set +e; $GRLM run three.yaml; echo code $?";
    let Some(Outcome { stdout, stderr, .. }) = mounting(&env, script) else { return };
    assert!(stdout.contains("3 cached, 0 to run, 0 maybe") && stdout.contains("code 4"), "{stdout}\n{stderr}");
    assert!(unwrapped(&stderr).contains("cannot be written") || stderr.contains("Read-only"), "{stderr}");
    assert!(env.ran().is_empty());
}
