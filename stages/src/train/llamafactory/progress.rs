//! `trainer_log.jsonl`: what LlamaFactory says about a run while it goes on.

use std::path::Path;

use serde::Deserialize;

use crate::{StageError, artifact::CurvePoint};

/// A line of the log. Which fields it has depends on what it reports.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Line {
    pub current_steps: u64,
    #[serde(default)]
    pub total_steps: u64,
    #[serde(default)]
    pub epoch: Option<f64>,
    #[serde(default)]
    pub loss: Option<f64>,
    #[serde(default, alias = "learning_rate")]
    pub lr: Option<f64>,
    #[serde(default)]
    pub eval_loss: Option<f64>,
}

impl Line {
    pub fn point(&self) -> CurvePoint {
        CurvePoint {
            step: self.current_steps,
            epoch: self.epoch.unwrap_or_default(),
            loss: self.loss,
            lr: self.lr,
            valid_loss: self.eval_loss,
            ..CurvePoint::default()
        }
    }
}

/// All lines that are whole, in the order of their steps: a resumed run may have repeated some, of which the later
/// count. Nothing if there is no log yet.
///
/// # Errors
/// The file cannot be read.
pub fn read(path: &Path) -> Result<Vec<Line>, StageError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(StageError::io("read", path, e)),
    };
    let mut lines: Vec<Line> = Vec::new();
    for line in text.lines().filter_map(|l| serde_json::from_str::<Line>(l).ok()) {
        let from = lines.partition_point(|l| l.current_steps < line.current_steps);
        // What follows an earlier step was written before the run went on from there.
        let repeats = lines[from..].iter().any(|l| l.current_steps > line.current_steps || l.is_same_kind(&line));
        if repeats {
            lines.truncate(from);
        }
        if line.loss.is_some() || line.eval_loss.is_some() {
            lines.push(line);
        }
    }
    Ok(lines)
}

impl Line {
    fn is_same_kind(&self, other: &Self) -> bool {
        self.loss.is_some() == other.loss.is_some()
    }
}

/// The newest `(step, steps)` of the log.
pub fn newest(path: &Path) -> Option<(u64, u64)> {
    let text = std::fs::read_to_string(path).ok()?;
    let line: Line = text.lines().rev().find_map(|l| serde_json::from_str(l).ok())?;
    (line.total_steps > 0).then_some((line.current_steps, line.total_steps))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_were_written_again_count_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trainer_log.jsonl");
        assert_eq!(read(&path).unwrap(), []);
        let text = r#"{"current_steps": 1, "total_steps": 4, "loss": 3.0, "lr": 0.1, "epoch": 0.5}
{"current_steps": 2, "total_steps": 4, "loss": 2.5, "lr": 0.1, "epoch": 1.0}
{"current_steps": 2, "total_steps": 4, "eval_loss": 2.0, "epoch": 1.0}
{"current_steps": 3, "total_steps": 4, "loss": 9.0, "lr": 0.1, "epoch": 1.5}
{"current_steps": 3, "total_steps": 4, "loss": 2.25, "lr": 0.05, "epoch": 1.5}
{"current_steps": 4, "total_steps": 4, "epoch": 2.0}
{"current_ste"#;
        std::fs::write(&path, text).unwrap();
        let lines = read(&path).unwrap();
        assert_eq!(
            lines.iter().map(|l| (l.current_steps, l.loss)).collect::<Vec<_>>(),
            [(1, Some(3.0)), (2, Some(2.5)), (2, None), (3, Some(2.25))]
        );
        assert_eq!(lines[2].point().valid_loss, Some(2.0));
        assert_eq!(newest(&path), Some((4, 4)));
    }
}
