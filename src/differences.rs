//! Differences between evaluated models, with intervals and p-values: what `compare` says beyond two numbers side by
//! side.
//!
//! Pairs models by user from the `per_user` artifact; the statistics are `grlm_stages::paired`.

use std::{collections::HashMap, path::Path};

use comfy_table::{CellAlignment, Table, presets};
use grlm_stages::{
    artifact::{PerUser, jsonl},
    paired::{Difference, Figure, differences, holm},
};
use serde_json::{Map, Value, json};

use crate::metrics::{Row, SHORT};

/// The target's rank for each user; `None` where it is not in the list.
pub type Ranks = HashMap<String, Option<u32>>;

/// Which row each row is compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Baseline {
    /// The first row of the same model: what a variant changes.
    FirstOfModel,
    /// A model, of the given variant or else of each row's own: how models differ.
    Model { variant: Option<String>, model: String },
}

/// A row beside its baseline, both by place.
#[derive(Debug)]
pub struct Compared {
    pub row: usize,
    pub baseline: usize,
    /// Users that both have evaluated.
    pub users: usize,
    /// Every one of these users counts the same in both, in all figures that both have: nothing is asked of them.
    pub same: bool,
    /// None, if they are the same.
    pub figures: Vec<Compare>,
}

/// One figure's difference, row − baseline, and its p-value after Holm's correction over everything compared.
#[derive(Debug)]
pub struct Compare {
    pub figure: &'static str,
    pub difference: Difference,
    pub adjusted_p: f64,
}

/// Reads a `per_user` artifact: ranks by model.
///
/// # Errors
/// A text that says what is wrong with the file.
pub fn read_ranks(path: &Path) -> Result<HashMap<String, Ranks>, String> {
    let mut models: HashMap<String, Ranks> = HashMap::new();
    for line in jsonl::lines::<PerUser>(path).map_err(|e| e.to_string())? {
        let line = line.map_err(|e| e.to_string())?;
        models.entry(line.model).or_default().insert(line.user.0, line.rank);
    }
    Ok(models)
}

impl Baseline {
    /// Reads `MODEL` or `VARIANT/MODEL`.
    pub fn parse(text: &str) -> Self {
        match text.rsplit_once('/') {
            Some((variant, model)) => Self::Model { variant: Some(variant.to_owned()), model: model.to_owned() },
            None => Self::Model { variant: None, model: text.to_owned() },
        }
    }

    /// The baseline of a row, unless that is itself or there is none.
    fn of(&self, row: usize, rows: &[Row]) -> Option<usize> {
        let own = &rows[row];
        let found = match self {
            Self::FirstOfModel => rows.iter().position(|r| r.model == own.model),
            Self::Model { variant: Some(variant), model } => {
                rows.iter().position(|r| r.variant == *variant && r.model == *model)
            }
            Self::Model { variant: None, model } => rows
                .iter()
                .position(|r| r.model == *model && (&r.variant, &r.stage) == (&own.variant, &own.stage))
                .or_else(|| rows.iter().position(|r| r.model == *model)),
        };
        found.filter(|found| *found != row)
    }

    /// Whether some row can be the baseline.
    pub fn is_among(&self, rows: &[Row]) -> bool {
        match self {
            Self::FirstOfModel => true,
            Self::Model { variant, model } => {
                rows.iter().any(|r| r.model == *model && variant.as_ref().is_none_or(|v| *v == r.variant))
            }
        }
    }
}

/// Compares every row with its baseline, where users of both are known. `ranks[i]` belongs to `rows[i]`. Holm's
/// correction counts the differences of those that are not the same.
pub fn compare(rows: &[Row], ranks: &[Option<Ranks>], baseline: &Baseline, resamples: u32, seed: u64) -> Vec<Compared> {
    let pair = |row: usize| {
        let base = baseline.of(row, rows)?;
        let (own, other) = (ranks[row].as_ref()?, ranks[base].as_ref()?);
        let figures: Vec<(&'static str, Figure)> = SHORT
            .into_iter()
            .filter(|name| rows[row].figures.contains_key(*name) && rows[base].figures.contains_key(*name))
            .filter_map(|name| Some((name, Figure::parse(name)?)))
            .collect();
        let (users, same, figures) = compare_pair(own, other, &figures, resamples, seed);
        Some(Compared { row, baseline: base, users, same, figures })
    };
    let mut all: Vec<Compared> = (0..rows.len()).filter_map(pair).collect();
    let p: Vec<f64> = all.iter().flat_map(|c| c.figures.iter().map(|f| f.difference.p)).collect();
    let places = all.iter_mut().flat_map(|c| &mut c.figures);
    places.zip(holm(&p)).for_each(|(place, p)| place.adjusted_p = p);
    all
}

/// The number of users of both, whether these are the same to both, and else the differences.
fn compare_pair(
    own: &Ranks,
    other: &Ranks,
    figures: &[(&'static str, Figure)],
    resamples: u32,
    seed: u64,
) -> (usize, bool, Vec<Compare>) {
    let mut users: Vec<&String> = own.keys().filter(|user| other.contains_key(*user)).collect();
    users.sort_unstable();
    let of = |ranks: &Ranks| -> Vec<Option<u32>> { users.iter().map(|user| ranks[*user]).collect() };
    let (first, second) = (of(other), of(own));
    let alike = |(a, b): (&Option<u32>, &Option<u32>)| figures.iter().all(|(_, f)| f.gain(*a) == f.gain(*b));
    if !users.is_empty() && !figures.is_empty() && first.iter().zip(&second).all(alike) {
        return (users.len(), true, Vec::new());
    }
    let parsed: Vec<Figure> = figures.iter().map(|(_, figure)| *figure).collect();
    let found = differences(&first, &second, &parsed, resamples, seed);
    let told = figures.iter().zip(found).map(|(&(figure, _), difference)| Compare {
        figure,
        difference,
        adjusted_p: difference.p,
    });
    (users.len(), false, told.collect())
}

/// One line a figure, then one for each pair that is the same. Intervals are of one difference each; p is corrected for
/// all lines.
pub fn table(rows: &[Row], compared: &[Compared]) -> String {
    let name = |place: usize| format!("{}/{}", rows[place].variant, rows[place].model);
    let mut lines = Vec::new();
    if compared.iter().any(|c| !c.figures.is_empty()) {
        lines.push(table_of(rows, compared));
    }
    let same = compared.iter().filter(|c| c.same);
    lines.extend(same.map(|c| format!("{}: counts the same for every user as {}", name(c.row), name(c.baseline))));
    lines.join("\n")
}

fn table_of(rows: &[Row], compared: &[Compared]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(["model", "against", "users", "figure", "difference", "95 % interval", "p (Holm)"]);
    let name = |place: usize| format!("{}/{}", rows[place].variant, rows[place].model);
    for c in compared {
        for f in &c.figures {
            let Difference { mean, low, high, .. } = f.difference;
            table.add_row([
                name(c.row),
                name(c.baseline),
                c.users.to_string(),
                f.figure.to_owned(),
                format!("{mean:+.4}"),
                format!("{low:+.4} … {high:+.4}"),
                format!("{:.4}", f.adjusted_p),
            ]);
        }
    }
    for column in [2, 4, 5, 6] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// What `--json` adds to a row.
pub fn json(rows: &[Row], compared: &Compared) -> Value {
    let base = &rows[compared.baseline];
    let figures: Map<String, Value> = compared
        .figures
        .iter()
        .map(|f| {
            let Difference { mean, low, high, p } = f.difference;
            let value = json!({"difference": mean, "ci95": [low, high], "p": p, "p_holm": f.adjusted_p});
            (f.figure.to_owned(), value)
        })
        .collect();
    let against = json!({"variant": base.variant, "stage": base.stage, "model": base.model});
    json!({"against": against, "users": compared.users, "same": compared.same, "figures": figures})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn row(variant: &str, model: &str) -> Row {
        let figures = BTreeMap::from([("recall@5".to_owned(), 0.5), ("ndcg@10".to_owned(), 0.5)]);
        Row { variant: variant.into(), stage: "evaluate".into(), model: model.into(), figures }
    }

    fn ranks(hits: std::ops::Range<usize>) -> Option<Ranks> {
        Some((0..200).map(|u| (u.to_string(), hits.contains(&u).then_some(1))).collect())
    }

    #[test]
    fn variants_are_compared_with_the_first_and_models_with_the_one_that_is_named() {
        let rows = [row("default", "lm"), row("default", "sasrec"), row("beams", "lm"), row("beams", "sasrec")];
        let of = |baseline: &Baseline| (0..4).map(|r| baseline.of(r, &rows)).collect::<Vec<_>>();
        assert_eq!(of(&Baseline::FirstOfModel), [None, None, Some(0), Some(1)]);
        assert_eq!(of(&Baseline::parse("sasrec")), [Some(1), None, Some(3), None]);
        assert_eq!(of(&Baseline::parse("default/lm")), [None, Some(0), Some(0), Some(0)]);
        assert!(!Baseline::parse("other").is_among(&rows) && !Baseline::parse("x/lm").is_among(&rows));
    }

    #[test]
    fn differences_stand_on_the_users_of_both_and_p_is_corrected() {
        let rows = [row("default", "lm"), row("beams", "lm"), row("more", "lm")];
        let mut fewer = ranks(0..60);
        fewer.as_mut().unwrap().retain(|user, _| user.parse::<usize>().unwrap() < 100);
        let all = [ranks(0..40), fewer, ranks(1..41)];
        let compared = compare(&rows, &all, &Baseline::FirstOfModel, 500, 1);
        assert_eq!(
            compared.iter().map(|c| (c.row, c.baseline, c.users)).collect::<Vec<_>>(),
            [(1, 0, 100), (2, 0, 200)]
        );
        let better = &compared[0].figures[0];
        assert!((better.difference.mean - 0.2).abs() < 1e-12 && better.difference.low > 0.1);
        assert!(better.adjusted_p > better.difference.p, "four questions were asked");
        assert_eq!(compared[1].figures[0].adjusted_p, 1.0);
        let text = table(&rows, &compared);
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(text.contains("beams/lm") && text.contains("+0.2000"), "{text}");
        assert!(compare(&rows, &[None, ranks(0..1), None], &Baseline::FirstOfModel, 10, 1).is_empty());
    }

    #[test]
    fn equal_lists_are_said_to_be_and_ask_no_question() {
        let rows = [row("default", "lm"), row("beams", "lm"), row("more", "lm")];
        // Behind the last place that counts, ranks may differ.
        let mut alike = ranks(0..40);
        alike.as_mut().unwrap().insert("150".into(), Some(11));
        let compared = compare(&rows, &[ranks(0..40), alike, ranks(20..100)], &Baseline::FirstOfModel, 500, 1);
        assert_eq!(compared.iter().map(|c| (c.same, c.figures.len())).collect::<Vec<_>>(), [(true, 0), (false, 2)]);
        let recall = &compared[1].figures[0];
        assert!(recall.adjusted_p <= 2.0 * recall.difference.p, "two questions were asked, not four");
        let text = table(&rows, &compared);
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(text.ends_with("beams/lm: counts the same for every user as default/lm"), "{text}");
        let mut others = [row("default", "lm"), row("beams", "lm")];
        others.iter_mut().for_each(|row| row.figures = [("recall@1".to_owned(), 0.5)].into_iter().collect());
        let nothing = compare(&others, &[ranks(0..40), ranks(0..40)], &Baseline::FirstOfModel, 500, 1);
        assert_eq!(table(&others, &nothing), "", "no figure that both have was compared");
        assert_eq!(table(&rows, &compared[..1]), "beams/lm: counts the same for every user as default/lm");
    }
}
