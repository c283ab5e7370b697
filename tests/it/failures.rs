//! Stages that fail, hang or retry.

use crate::environment::{Environment, THREE, three, unwrapped};

#[test]
fn a_failing_stage_stops_the_run_with_its_last_words() {
    let env = three();
    env.write("three.yaml", &THREE.replace("tr a-z A-Z < ${inputs.text}", "echo the disk ate it >&2; exit 7"));
    let said = env.fails(1, &["run", "three.yaml"]);
    assert!(said.contains("upper") && said.contains("status 7") && said.contains("the disk ate it"), "{said}");
    assert!(!env.ran().contains(&"count".to_owned()));
    let logs = env.ok(&["logs", "upper"]).stdout;
    assert!(logs.contains("the disk ate it"), "{logs}");
}

#[test]
fn keep_going_finishes_what_does_not_depend_on_the_failure() {
    let env = three();
    env.write("three.yaml", &THREE.replace("tr a-z A-Z < ${inputs.text}", "exit 7"));
    env.fails(1, &["run", "three.yaml", "--keep-going"]);
    assert_eq!(env.ran(), ["other", "upper"]);
    env.write("three.yaml", THREE);
    env.ok(&["run", "three.yaml"]);
    assert_eq!(env.ran(), ["count", "upper"], "what was finished is not done again");
}

#[test]
fn retries_run_a_stage_again() {
    let env = Environment::new();
    env.write(
        "flaky.yaml",
        r#"
name: flaky
stages:
  once:
    uses: command
    retries: 2
    with: { run: "echo once >> journal; test $(wc -l < journal) -ge 2 && echo done > ${outputs.out}" }
    outputs: { out: once.txt }
"#,
    );
    env.ok(&["run", "flaky.yaml"]);
    assert_eq!(env.ran(), ["once", "once"]);
}

#[test]
fn a_stage_that_runs_longer_than_its_timeout_is_ended() {
    let env = Environment::new();
    env.write(
        "slow.yaml",
        r#"
name: slow
stages:
  sleep:
    uses: command
    timeout: 1s
    with: { run: "sleep 600 & sleep 600; echo > ${outputs.out}" }
    outputs: { out: x.txt }
"#,
    );
    let said = env.fails(1, &["run", "slow.yaml"]);
    assert!(said.contains("timeout") || said.contains("longer than"), "{said}");
}

#[test]
fn a_request_that_no_machine_can_meet_is_refused_before_anything_runs() {
    let env = three();
    env.write("three.yaml", &THREE.replacen("  count:\n", "  count:\n    resources: { gpus: 3 }\n", 1));
    let said = env.fails(5, &["run", "three.yaml", "--devices", "sim:2x80GiB"]);
    assert!(said.contains("count") && said.contains('3'), "{said}");
    assert!(env.ran().is_empty());
    env.ok(&["run", "three.yaml", "--devices", "sim:4x80GiB"]);
}

#[test]
fn secrets_are_blanked_in_logs() {
    let env = Environment::new();
    env.write(
        "secret.yaml",
        r#"
name: secret
stages:
  tell:
    uses: command
    secrets: [TOKEN]
    with: { run: "echo my token is $TOKEN; echo ok > ${outputs.out}" }
    outputs: { out: x.txt }
"#,
    );
    let output = env.command(&["run", "secret.yaml"]).env("TOKEN", "hunter2secret").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let logs = env.ok(&["logs", "tell"]).stdout;
    assert!(logs.contains("my token is") && !logs.contains("hunter2secret"), "{logs}");
    for (path, content) in env.tree(".grlm") {
        assert!(!String::from_utf8_lossy(&content).contains("hunter2secret"), "{}", path.display());
    }
}

#[test]
fn what_changes_while_a_stage_runs_gives_no_result() {
    let env = three();
    let edit = |run: &str| {
        THREE
            .replace("tr a-z A-Z < ${inputs.text}", run)
            .replace("    uses: command", "    uses: command\n    code: [c.sh]")
    };
    env.write("c.sh", "cat\n");
    for (what, run) in
        [("input `text` (src.txt)", "echo later >> src.txt; cat"), ("code c.sh", "echo '#' >> c.sh; cat")]
    {
        env.write("three.yaml", &edit(&format!("{run} < ${{inputs.text}}")));
        let said = env.fails(1, &["run", "three.yaml", "--until", "upper"]);
        assert!(said.contains(&format!("{what} changed while the stage ran")), "{said}");
    }
    // Unchanged, it has one.
    env.write("three.yaml", &edit("sh c.sh < ${inputs.text}"));
    env.ok(&["run", "three.yaml", "--until", "upper"]);
}

/// What the journal of the only run has of a kind of event.
fn events(env: &Environment, kind: &str) -> Vec<serde_json::Value> {
    let files = env.tree(".grlm/runs");
    let (_, text) = files.iter().find(|(path, _)| path.ends_with("events.jsonl")).unwrap();
    let all = String::from_utf8_lossy(text).lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<_>>();
    all.into_iter().filter(|event: &serde_json::Value| event["kind"] == kind).collect()
}

#[test]
fn an_output_that_cannot_be_stored_fails_its_stage_and_no_other() {
    let env = Environment::new();
    env.write(
        "odd.yaml",
        r#"
name: odd
stages:
  odd:
    uses: command
    with: { run: "mkdir ${outputs.out}; ln -s nowhere ${outputs.out}/link" }
    outputs: { out: f }
  plain:
    uses: command
    with: { run: "sleep 0.5; echo plain > ${outputs.out}" }
    outputs: { out: x.txt }
"#,
    );
    let said = env.fails(1, &["run", "odd.yaml", "--keep-going"]);
    assert!(said.contains("odd: failed: output `out` (f): `link` is a link that leads nowhere"), "{said}");
    assert!(said.contains("help: remove the link"), "{said}");
    assert_eq!(env.read("out/odd/plain/x.txt"), "plain\n");
    assert_eq!(events(&env, "failed")[0]["stage"], "odd");
    assert_eq!(events(&env, "run_finished")[0]["outcome"], "failed");
}

#[test]
fn a_run_that_cannot_show_its_results_ends_and_says_what_to_do() {
    let env = three();
    env.write("out/three/upper", "in the way");
    let said = unwrapped(&env.fails(4, &["run", "three.yaml"]));
    assert!(said.contains("cannot show `upper.out` at out/three/upper/upper.txt"), "{said}");
    assert!(said.contains("`--out FOLDER`"), "{said}");
    assert_eq!(events(&env, "run_finished")[0]["outcome"], "failed");
    let status = env.ok(&["status"]).stdout;
    assert!(status.contains("failed") && !status.contains("died"), "{status}");
    assert_eq!(events(&env, "skipped").pop().unwrap()["because"], "the run could not go on");
}

#[test]
fn an_input_that_cannot_be_stored_is_named() {
    let env = three();
    env.write("src.d/plain", "x");
    std::os::unix::fs::symlink("nowhere", env.path("src.d/link")).unwrap();
    for arguments in [&["plan", "three.yaml"], &["run", "three.yaml"]] {
        let said =
            unwrapped(&env.fails(3, &[arguments[0], arguments[1], "--until", "upper", "--set", "vars.source=src.d"]));
        assert!(said.contains("input `upper.text` (src.d): `src.d/link` is a link that leads nowhere"), "{said}");
    }
    assert!(!env.ok(&["status"]).stdout.contains("died"));
}

#[test]
fn a_plan_ends_with_why_the_run_will_be_refused() {
    let env = three();
    env.write("three.yaml", &THREE.replacen("  count:\n", "  count:\n    resources: { gpus: 3 }\n", 1));
    let plan = env.ok(&["run", "three.yaml", "--dry-run", "--devices", "none"]).stdout;
    let last = plan.lines().last().unwrap();
    assert!(last.starts_with("`grlm run` will refuse: stage `count` cannot run here: it needs 3 GPUs"), "{plan}");
    assert!(!env.ok(&["plan", "three.yaml", "--until", "upper"]).stdout.contains("refuse"));
}

const ASKING: &str = r#"
name: asking
stages:
  make:
    uses: synth
    with: { items: 40, users: 8 }
  near:
    uses: similarity
    secrets: [GRLM_TEST_ASKING_KEY]
    inputs: { items: make.items }
    with: { encoder: { endpoint: "http://127.0.0.1:9/v1", model: m, api_key_env: GRLM_TEST_ASKING_KEY } }
"#;

#[test]
fn a_server_s_key_that_is_not_set_is_missed_before_anything_runs() {
    let env = Environment::new();
    env.write("asking.yaml", ASKING);
    let said = unwrapped(&env.fails(3, &["run", "asking.yaml"]));
    assert!(said.contains("`near` asks a server with the key in `GRLM_TEST_ASKING_KEY`, which is not set"), "{said}");
    assert!(!env.path("out").exists(), "nothing ran");
    let plan = env.ok(&["plan", "asking.yaml"]).stdout;
    assert!(plan.contains("`grlm run` will refuse: `near` asks a server"), "{plan}");
    env.ok(&["run", "asking.yaml", "--only", "make"]);
}

#[test]
fn doctor_misses_a_server_s_key_that_is_not_set() {
    let env = Environment::new();
    let noisy = "  noisy:\n    uses: command\n    secrets: [GRLM_TEST_TOKEN]\n    with: { run: 'true > ${outputs.out}' }\n    \
                 outputs: { out: out.txt }\n";
    env.write("asking.yaml", &format!("{ASKING}{noisy}"));
    let doctor = |key: &str| {
        let mut command = env.command(&["doctor", "asking.yaml", "--devices", "none"]);
        let output = command.env("GRLM_TEST_ASKING_KEY", key).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, said) = doctor(" ");
    assert_eq!(code, Some(6), "{said}");
    let wanted = "wrong keys     `near` asks a server with the key in `GRLM_TEST_ASKING_KEY`, which is not set";
    assert!(said.contains(wanted) && said.contains("export GRLM_TEST_ASKING_KEY"), "{said}");
    assert!(said.contains("note  keys     `GRLM_TEST_TOKEN`, a secret of `noisy`, is not set"), "{said}");
    let (code, said) = doctor("sk-1234567");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("`GRLM_TEST_ASKING_KEY` is set") && !said.contains("sk-1234567"), "{said}");
}

/// A server of embeddings: every text has the same.
fn embeddings() -> String {
    use std::io::{BufRead, Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/v1", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut reader = std::io::BufReader::new(stream.try_clone().unwrap());
            let (mut line, mut length) = (String::new(), 0);
            while reader.read_line(&mut line).unwrap() > 2 {
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                line.clear();
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let texts = body["input"].as_array().unwrap().len();
            let data: Vec<_> =
                (0..texts).map(|index| serde_json::json!({"index": index, "embedding": [1.0, 0.5]})).collect();
            let answer = serde_json::json!({"data": data}).to_string();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", answer.len());
            let _ = stream.write_all(format!("{head}{answer}").as_bytes());
        }
    });
    address
}

#[test]
fn a_server_s_key_is_not_missed_where_every_answer_is_known() {
    let env = Environment::new();
    let asking = ASKING.replace("http://127.0.0.1:9/v1", &embeddings());
    env.write("asking.yaml", &asking);
    let with_key = env.command(&["run", "asking.yaml"]).env("GRLM_TEST_ASKING_KEY", "any").output().unwrap();
    assert!(with_key.status.success(), "{}", String::from_utf8_lossy(&with_key.stderr));
    env.write("asking.yaml", &asking.replace("encoder: {", "top_k: 3, encoder: {"));
    assert_eq!(env.computed("asking.yaml", "near"), Some(0));
}

#[test]
fn a_damaged_file_is_not_told_as_a_missing_key() {
    let env = Environment::new();
    let (begin, end) = (ASKING.find("  make:").unwrap(), ASKING.find("  near:").unwrap());
    let asking = format!("{}{}", &ASKING[..begin], &ASKING[end..]).replace("make.items", "{ file: items.jsonl }");
    env.write("asking.yaml", &asking);
    env.write("items.jsonl", "{\"id\": \"1\", \"title\":\n");
    let said = unwrapped(&env.fails(3, &["run", "asking.yaml"]));
    assert!(
        said.contains("`near`: ") && said.contains("items.jsonl:1") && !said.contains("which is not set"),
        "{said}"
    );
}

#[test]
fn a_model_that_the_hub_does_not_have_is_a_mistake_before_anything_runs() {
    let hub = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", hub.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in hub.incoming().flatten() {
            let mut request = [0; 4096];
            let _ = std::io::Read::read(&mut stream, &mut request);
            let answer = "HTTP/1.1 404 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = std::io::Write::write_all(&mut stream, answer.as_bytes());
        }
    });
    let env = Environment::new();
    let model = "encoder: { model: Qwen/Qwen3-Embeding-0.6B }";
    let from = ASKING.find("encoder:").unwrap();
    env.write("asking.yaml", &format!("{}{model} }}\n", &ASKING[..from]));
    for verb in ["plan", "run"] {
        let output = env.command(&[verb, "asking.yaml"]).env("HF_ENDPOINT", &address).output().unwrap();
        let said = unwrapped(&String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.contains("the model of `near` (`encoder.model`)") && said.contains("status 404"), "{said}");
        assert!(said.contains("check the spelling"), "{said}");
    }
    // Without the hub a plan is of use, and a run is not.
    let offline = |verb| env.command(&[verb, "asking.yaml"]).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(offline("plan").status.success());
    let said = unwrapped(&String::from_utf8_lossy(&offline("run").stderr));
    assert!(said.contains("the hub is switched off") && said.contains("HF_HUB_OFFLINE"), "{said}");
    assert!(!env.path("out").exists(), "nothing ran");
}
