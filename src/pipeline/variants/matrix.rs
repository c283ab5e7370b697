//! The cells of a matrix: every combination of its values, the last path changing fastest. A cell is named by its
//! values, `train.with.lr=0.0001`, and made only when it is asked for: a file may hold many large matrices.

use std::{
    collections::{HashMap, HashSet},
    sync::OnceLock,
};

use serde_json::{Map, Value};

use crate::pipeline::{
    mistake::{Mistake, below},
    spec::Shown,
};

/// More cells than this are a slip of the pen.
const MAX_CELLS: usize = 10_000;

/// One cell: its values by path.
pub(super) type Cell = Vec<(String, Value)>;

#[derive(Debug, Default)]
pub(super) struct Matrix {
    axes: Vec<(String, Vec<Value>)>,
    by_name: OnceLock<HashMap<String, usize>>,
}

impl Matrix {
    /// Reads a `matrix:` block, which stands at `at`. With mistakes it has no cells.
    pub fn read(written: &Map<String, Value>, at: &[String], mistakes: &mut Vec<Mistake>) -> Self {
        let before = mistakes.len();
        let axes: Vec<(String, Vec<Value>)> = written
            .iter()
            .map(|(target, values)| (target.clone(), axis(values, &below(at, &[target]), mistakes)))
            .collect();
        let count = product(&axes);
        if count > MAX_CELLS {
            mistakes.push(
                Mistake::key(at, format!("the matrix has {count} cells, at most {MAX_CELLS} are allowed"))
                    .help("leave out some of the values, or make several variants of it"),
            );
        }
        match mistakes.len() > before {
            true => Self::default(),
            false => Self { axes, by_name: OnceLock::new() },
        }
    }

    /// How many cells there are; 0 if there is no matrix.
    pub fn count(&self) -> usize {
        if self.axes.is_empty() { 0 } else { product(&self.axes) }
    }

    pub fn names(&self) -> impl Iterator<Item = String> + '_ {
        (0..self.count()).map(|i| cell_name(&self.cell(i)))
    }

    /// The cell of this name, or of the same values spelled otherwise (`1e-4` for `0.0001`).
    pub fn find(&self, name: &str) -> Option<Cell> {
        let by_name = self.by_name.get_or_init(|| self.names().zip(0..).collect());
        match by_name.get(name) {
            Some(&i) => Some(self.cell(i)),
            None => (0..self.count()).map(|i| self.cell(i)).find(|cell| same_values(name, cell)),
        }
    }

    fn cell(&self, number: usize) -> Cell {
        let mut rest = number;
        let mut cell: Cell = Vec::with_capacity(self.axes.len());
        for (target, values) in self.axes.iter().rev() {
            cell.push((target.clone(), values[rest % values.len()].clone()));
            rest /= values.len();
        }
        cell.reverse();
        cell
    }
}

fn product(axes: &[(String, Vec<Value>)]) -> usize {
    axes.iter().fold(1, |count, (_, values)| count.saturating_mul(values.len()))
}

/// The values of one path: a list of some, all different.
fn axis(written: &Value, at: &[String], mistakes: &mut Vec<Mistake>) -> Vec<Value> {
    let Value::Array(values) = written else {
        let message = format!("a matrix takes a list of values for each path, found {}", Shown(written));
        mistakes.push(Mistake::value(at, message).help("write `[1, 2]`; a value for every cell belongs under `set`"));
        return Vec::new();
    };
    if values.is_empty() {
        let message = "an empty list leaves the matrix without cells";
        mistakes.push(Mistake::value(at, message).help("give it values, or take the path out"));
    }
    let mut seen = HashSet::new();
    for (i, value) in values.iter().enumerate() {
        if !seen.insert(value_name(value)) {
            let message = format!("two cells would have the name `{}`", value_name(value));
            mistakes.push(Mistake::value(&below(at, &[i.to_string()]), message).help("take one of the values out"));
        }
    }
    values.clone()
}

fn value_name(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn cell_name(cell: &Cell) -> String {
    let parts: Vec<String> = cell.iter().map(|(target, value)| format!("{target}={}", value_name(value))).collect();
    parts.join(",")
}

fn same_values(text: &str, cell: &Cell) -> bool {
    let parts: Vec<&str> = text.split(',').collect();
    parts.len() == cell.len()
        && parts.iter().zip(cell).all(|(part, (target, value))| {
            part.split_once('=')
                .is_some_and(|(t, v)| t == target && serde_yaml::from_str::<Value>(v).is_ok_and(|v| v == *value))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Matrix, Vec<String>) {
        let written: Map<String, Value> = serde_yaml::from_str(text).unwrap();
        let mut mistakes = Vec::new();
        let matrix = Matrix::read(&written, &["matrix".to_owned()], &mut mistakes);
        (matrix, mistakes.into_iter().map(|m| format!("{}: {}", m.path.join("."), m.message)).collect())
    }

    fn numbers(count: usize) -> String {
        format!("[{}]", (0..count).map(|n| n.to_string()).collect::<Vec<_>>().join(","))
    }

    #[test]
    fn every_combination_is_a_cell() {
        let (matrix, _) = read("{ a.n: [1e-4, 2], b.k: [x, y] }");
        assert_eq!(
            matrix.names().collect::<Vec<_>>(),
            ["a.n=0.0001,b.k=x", "a.n=0.0001,b.k=y", "a.n=2,b.k=x", "a.n=2,b.k=y"]
        );
        assert_eq!(matrix.find("a.n=1e-4,b.k=y"), matrix.find("a.n=0.0001,b.k=y"));
        assert!(matrix.find("a.n=2,b.k=y").is_some() && matrix.find("a.n=3,b.k=y").is_none());
    }

    #[test]
    fn ten_thousand_cells_are_read_and_one_more_is_refused() {
        assert_eq!(read(&format!("{{ a: {}, b: {} }}", numbers(100), numbers(100))).0.count(), 10_000);
        for text in [
            format!("{{ a: {} }}", numbers(10_001)),
            format!("{{ a: {}, b: {} }}", numbers(150), numbers(150)),
            format!("{{ a: [1, 2], b: {} }}", numbers(6000)),
        ] {
            let (matrix, mistakes) = read(&text);
            assert_eq!(matrix.count(), 0);
            assert!(mistakes.len() == 1 && mistakes[0].contains("at most 10000"), "{mistakes:?}");
        }
        assert!(read(&format!("{{ a: {}, b: {} }}", numbers(150), numbers(150))).1[0].contains("22500 cells"));
    }

    #[test]
    fn empty_lists_scalars_and_repeated_values_are_refused() {
        for (text, wanted) in [
            ("{ a.timeout: [] }", "matrix.a.timeout: an empty list"),
            ("{ a.n: 5 }", "matrix.a.n: a matrix takes a list"),
            ("{ a.n: { x: [1] } }", "matrix.a.n: a matrix takes a list"),
            ("{ a.n: [1, 2, 1] }", "matrix.a.n.2: two cells would have the name `1`"),
            ("{ a.n: [1, '1'] }", "matrix.a.n.1: two cells"),
        ] {
            let (matrix, mistakes) = read(text);
            assert_eq!(matrix.count(), 0, "{text}");
            assert!(mistakes.len() == 1 && mistakes[0].starts_with(wanted), "{mistakes:?}");
        }
    }
}
