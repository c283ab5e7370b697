//! Variants, matrices and sweeps.

use crate::environment::{THREE, three};

fn with_variants() -> String {
    format!(
        r#"{THREE}
variants:
  short: {{ set: {{ upper.with.run: "echo upper >> journal; head -c 2 ${{inputs.text}} > ${{outputs.out}}" }} }}
  none: {{ set: {{ other: null }} }}
  source: {{ matrix: {{ vars.source: [src.txt, b.txt] }} }}
"#
    )
}

#[test]
fn a_variant_runs_beside_the_default_and_shares_what_is_equal() {
    let env = three();
    env.write("three.yaml", &with_variants());
    env.ok(&["run", "three.yaml"]);
    env.ran();
    env.ok(&["run", "three.yaml", "--variant", "short"]);
    assert_eq!(env.ran(), ["count", "upper"]);
    assert_eq!(env.read("out/three@short/upper/upper.txt"), "he");
    assert_eq!(env.read("out/three/upper/upper.txt"), "HELLO\n");
}

#[test]
fn a_sweep_runs_each_distinct_stage_once_and_equals_single_runs() {
    let env = three();
    env.write("b.txt", "bee\n");
    env.write("three.yaml", &with_variants());
    env.ok(&["sweep", "three.yaml", "short", "none", "source"]);
    // short: upper', count', other; none: upper, count; source=src.txt: nothing new; source=b.txt: all three.
    assert_eq!(env.ran(), ["count", "count", "count", "other", "other", "upper", "upper", "upper"]);
    let swept = env.tree("out");
    let single = three();
    single.write("b.txt", "bee\n");
    single.write("three.yaml", &with_variants());
    for variant in ["short", "none", "source[vars.source=src.txt]", "source[vars.source=b.txt]"] {
        single.ok(&["run", "three.yaml", "--variant", variant]);
    }
    let relative = |files: Vec<(std::path::PathBuf, Vec<u8>)>, root: std::path::PathBuf| -> Vec<_> {
        files.into_iter().map(|(p, c)| (p.strip_prefix(&root).unwrap().to_owned(), c)).collect()
    };
    assert_eq!(relative(swept, env.path("out")), relative(single.tree("out"), single.path("out")));
}

#[test]
fn a_matrix_asked_for_by_its_name_lists_its_cells_and_stops() {
    let env = three();
    env.write("three.yaml", &with_variants());
    let said = env.fails(3, &["run", "three.yaml", "--variant", "source"]);
    assert!(said.contains("source[vars.source=b.txt]"), "{said}");
    assert!(env.ran().is_empty());
}

#[test]
fn compare_puts_metrics_side_by_side() {
    let env = three();
    env.write(
        "m.yaml",
        r#"
name: m
vars: { value: 0.25 }
stages:
  evaluate:
    uses: command
    with: { run: "echo '{\"lm\": {\"recall@5\": ${vars.value}, \"users\": 4}}' > ${outputs.metrics}" }
    outputs: { metrics: metrics.json }
variants:
  better: { set: { vars.value: 0.5 } }
"#,
    );
    env.ok(&["sweep", "m.yaml"]);
    let table = env.ok(&["compare", "m.yaml"]).stdout;
    assert!(table.contains("0.2500") && table.contains("0.5000 (+0.2500)"), "{table}");
    let json = env.ok(&["compare", "m.yaml", "--json"]).stdout;
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(value.as_array().map(Vec::len), Some(2), "{json}");
}

/// Forty users; the ranking stage finds the targets of those whose number is below `hits`.
#[test]
fn compare_says_how_sure_a_difference_is() {
    let env = three();
    let user = |u: usize| format!(r#"{{"user":"u{u}","history":["a"],"valid":"b","test":"c"}}"#);
    env.write("holdout.jsonl", &(0..40).map(|u| user(u) + "\n").collect::<String>());
    env.write(
        "m.yaml",
        r#"
name: m
vars: { hits: 10 }
stages:
  few:
    uses: command
    with: { run: 'for u in $(seq 0 39); do test $u -lt 10 && i=c || i=x; echo "{\"user\":\"u$u\",\"split\":\"test\",\"target\":\"c\",\"items\":[\"$i\"],\"scores\":[1]}"; done > ${outputs.out}' }
    outputs: { out: rankings.jsonl }
  many:
    uses: command
    with: { run: 'for u in $(seq 0 39); do test $u -lt ${vars.hits} && i=c || i=x; echo "{\"user\":\"u$u\",\"split\":\"test\",\"target\":\"c\",\"items\":[\"$i\"],\"scores\":[1]}"; done > ${outputs.out}' }
    outputs: { out: rankings.jsonl }
  evaluate:
    uses: evaluate
    inputs: { holdout: { file: holdout.jsonl }, few: few.out, many: many.out }
    with: { k: [5, 10], bootstrap: 0 }
variants:
  better: { set: { vars.hits: 30 } }
"#,
    );
    env.ok(&["sweep", "m.yaml"]);
    let table = env.ok(&["compare", "m.yaml"]).stdout;
    assert!(table.contains("better/many") && table.contains("+0.5000"), "{table}");
    let json = env.ok(&["compare", "m.yaml", "--json", "--resamples", "500"]).stdout;
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let many = value.as_array().unwrap().iter().find(|r| r["variant"] == "better" && r["model"] == "many").unwrap();
    let recall = &many["comparison"]["figures"]["recall@5"];
    assert_eq!((&many["comparison"]["users"], &recall["difference"]), (&40.into(), &0.5.into()));
    assert!(recall["ci95"][0].as_f64() > Some(0.3) && recall["p_holm"].as_f64() < Some(0.05), "{json}");

    // Within each variant, against the model that is named.
    let table = env.ok(&["compare", "m.yaml", "better", "--baseline", "few"]).stdout;
    assert!(table.contains("better/many") && table.contains("better/few") && table.contains("+0.5000"), "{table}");
    assert!(env.fails(3, &["compare", "m.yaml", "--baseline", "other"]).contains("no metrics of `other`"));
}

#[test]
fn compare_leaves_out_metrics_that_it_cannot_read() {
    let env = three();
    env.write(
        "m.yaml",
        r#"
name: m
vars: { text: '{"lm": {"recall@5": 0.25}}' }
stages:
  evaluate:
    uses: command
    with: { run: "echo '${vars.text}' > ${outputs.metrics}" }
    outputs: { metrics: metrics.json }
variants:
  cut: { set: { vars.text: "{" } }
"#,
    );
    env.ok(&["sweep", "m.yaml"]);
    let told = env.ok(&["compare", "m.yaml"]);
    assert!(told.stdout.contains("0.2500"), "{told:?}");
    assert!(told.stderr.contains("left out: cut/evaluate: metrics.json: not valid JSON"), "{told:?}");
}
