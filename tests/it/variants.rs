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
