//! The `metrics` artifact as the orchestrator shows it: at the end of a run, and side by side in `compare`.
//!
//! The artifact is one JSON object, model → figures; only numbers at its top level are shown. How they are computed
//! is the `evaluate` stage's business.

use std::{collections::BTreeMap, path::Path};

use comfy_table::{CellAlignment, Table, presets};
use serde_json::Value;

/// The columns of the short table, where they exist.
pub const SHORT: [&str; 4] = ["recall@5", "ndcg@5", "recall@10", "ndcg@10"];

/// One model's figures, by name.
pub type Figures = BTreeMap<String, f64>;

/// One line of a table: where the model was evaluated, its name, its figures.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub variant: String,
    pub stage: String,
    pub model: String,
    pub figures: Figures,
}

/// Reads a `metrics` artifact: models in file order, and their figures.
///
/// # Errors
/// A text that says what is wrong with the file.
pub fn read(path: &Path) -> Result<Vec<(String, Figures)>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| format!("{}: not valid JSON: {e}", path.display()))?;
    let Value::Object(models) = value else {
        return Err(format!("{}: expected an object, model → figures", path.display()));
    };
    Ok(models
        .into_iter()
        .filter_map(|(model, figures)| {
            let figures: Figures =
                figures.as_object()?.iter().filter_map(|(name, v)| Some((name.clone(), v.as_f64()?))).collect();
            Some((model, figures))
        })
        .collect())
}

/// A table of the usual figures. With `differences`, every row after the first of its model also shows how far it is
/// from that first one.
pub fn table(rows: &[Row], differences: bool) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let several = rows.iter().any(|r| (&r.variant, &r.stage) != (&rows[0].variant, &rows[0].stage));
    let mut header: Vec<String> = if several { vec!["variant".into(), "stage".into()] } else { Vec::new() };
    header.push("model".into());
    header.extend(SHORT.iter().map(|s| (*s).to_owned()));
    header.push("users".into());
    let text_columns = header.len() - SHORT.len() - 1;
    table.set_header(header);
    for (i, row) in rows.iter().enumerate() {
        let baseline = rows[..i].iter().find(|r| r.model == row.model).filter(|_| differences);
        let mut cells = if several { vec![row.variant.clone(), row.stage.clone()] } else { Vec::new() };
        cells.push(row.model.clone());
        cells
            .extend(SHORT.iter().map(|name| cell(row.figures.get(*name), baseline.and_then(|b| b.figures.get(*name)))));
        cells.push(row.figures.get("users").map_or_else(|| "–".into(), |u| format!("{u}")));
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(text_columns) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

fn cell(value: Option<&f64>, baseline: Option<&f64>) -> String {
    match (value, baseline) {
        (None, _) => "–".into(),
        (Some(v), None) => format!("{v:.4}"),
        (Some(v), Some(b)) => format!("{v:.4} ({:+.4})", v - b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_numbers_and_leaves_nested_groups_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.json");
        std::fs::write(&path, r#"{"lm": {"recall@5": 0.5, "users": 10, "by_group": {"1": {}}}, "note": "x"}"#).unwrap();
        let read = read(&path).unwrap();
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].0, "lm");
        assert_eq!(read[0].1.get("recall@5"), Some(&0.5));
        assert!(!read[0].1.contains_key("by_group"));
    }

    #[test]
    fn differences_are_taken_from_the_first_row_of_the_same_model() {
        let row = |variant: &str, value: f64| Row {
            variant: variant.into(),
            stage: "evaluate".into(),
            model: "lm".into(),
            figures: BTreeMap::from([("recall@5".into(), value), ("users".into(), 3.0)]),
        };
        let text = table(&[row("default", 0.25), row("beams", 0.2)], true);
        insta::assert_snapshot!(text, @r"
        variant  stage     model          recall@5  ndcg@5  recall@10  ndcg@10  users
        default  evaluate  lm               0.2500       –          –        –      3
        beams    evaluate  lm     0.2000 (-0.0500)       –          –        –      3
        ");
    }
}
