//! `trainer_log.jsonl`: what LlamaFactory says about a run while it goes on.

use std::{fs, io, path::Path};

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::{StageError, artifact::CurvePoint};

/// A line of the log. Which fields it has depends on what it reports.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Line {
    pub current_steps: u64,
    #[serde(default)]
    pub total_steps: u64,
    #[serde(default, deserialize_with = "number")]
    pub epoch: Option<f64>,
    #[serde(default, deserialize_with = "number")]
    pub loss: Option<f64>,
    #[serde(default, alias = "learning_rate", deserialize_with = "number")]
    pub lr: Option<f64>,
    #[serde(default, deserialize_with = "number")]
    pub eval_loss: Option<f64>,
}

/// A number, or the name of one that JSON does not have.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::Number(number) => number.as_f64(),
        Value::String(name) => name.parse().ok(),
        _ => None,
    })
}

impl Line {
    /// A line of the file; `None` for one that is not whole.
    fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).or_else(|_| serde_json::from_str(&with_names_quoted(line))).ok()
    }

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

    fn is_same_kind(&self, other: &Self) -> bool {
        self.loss.is_some() == other.loss.is_some()
    }

    /// # Errors
    /// A loss is not a finite number.
    fn check(&self) -> Result<(), StageError> {
        for (what, loss) in [("the loss", self.loss), ("the validation loss", self.eval_loss)] {
            if loss.is_some_and(|loss| !loss.is_finite()) {
                return Err(StageError::params(format!("{what} is not finite at step {}", self.current_steps))
                    .help("a lower `lr` or a longer `warmup` helps most often; so does a lower `clip`"));
            }
        }
        Ok(())
    }
}

/// Python writes numbers that are not finite by their names, without quotes, which is not JSON.
fn with_names_quoted(line: &str) -> String {
    let quoted = |text: &str| {
        let text = text.replace("NaN", "\"nan\"").replace("-Infinity", "\"-inf\"");
        text.replace("Infinity", "\"inf\"")
    };
    // Every second part is inside of quotes.
    let parts = line.split('"').enumerate();
    parts.map(|(i, part)| if i % 2 == 0 { quoted(part) } else { part.to_owned() }).collect::<Vec<_>>().join("\"")
}

/// The whole file; nothing if there is none yet.
fn text(path: &Path) -> Result<String, StageError> {
    match fs::read_to_string(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        text => text.map_err(|e| StageError::io("read", path, e)),
    }
}

/// All lines that are whole, in the order of their steps: a resumed run may have repeated some, of which the later
/// count.
///
/// # Errors
/// The file cannot be read; a loss is not finite.
pub fn read(path: &Path) -> Result<Vec<Line>, StageError> {
    let mut lines: Vec<Line> = Vec::new();
    for line in text(path)?.lines().filter_map(Line::parse) {
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
    lines.iter().try_for_each(Line::check)?;
    Ok(lines)
}

/// Takes out what was written after `step`, from which a run goes on: it will write it again.
///
/// # Errors
/// The file cannot be read or written.
pub fn rewind(path: &Path, step: u64) -> Result<(), StageError> {
    let before = text(path)?;
    let stays = |line: &&str| Line::parse(line).is_some_and(|l| l.current_steps <= step);
    let after: String = before.lines().filter(stays).flat_map(|line| [line, "\n"]).collect();
    match after == before {
        true => Ok(()),
        false => fs::write(path, after).map_err(|e| StageError::io("write", path, e)),
    }
}

/// The log while it grows.
pub struct Watch<'a> {
    path: &'a Path,
    /// Bytes that were looked at.
    seen: usize,
}

impl<'a> Watch<'a> {
    pub fn new(path: &'a Path) -> Self {
        Self { path, seen: 0 }
    }

    /// The newest `(step, steps)` since the last look.
    ///
    /// # Errors
    /// The file cannot be read; a loss is not finite.
    pub fn look(&mut self) -> Result<Option<(u64, u64)>, StageError> {
        let text = text(self.path)?;
        let Some((whole, _)) = text.get(self.seen..).and_then(|new| new.rsplit_once('\n')) else { return Ok(None) };
        self.seen += whole.len() + 1;
        let mut newest = None;
        for line in whole.lines().filter_map(Line::parse) {
            line.check()?;
            newest = Some((line.current_steps, line.total_steps)).filter(|(_, steps)| *steps > 0).or(newest);
        }
        Ok(newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = r#"{"current_steps": 1, "total_steps": 4, "loss": 3.0, "lr": 0.1, "epoch": 0.5}
{"current_steps": 2, "total_steps": 4, "loss": 2.5, "lr": 0.1, "epoch": 1.0}
{"current_steps": 2, "total_steps": 4, "eval_loss": 2.0, "epoch": 1.0}
{"current_steps": 3, "total_steps": 4, "loss": 9.0, "lr": 0.1, "epoch": 1.5}
{"current_steps": 3, "total_steps": 4, "loss": 2.25, "lr": 0.05, "epoch": 1.5}
{"current_steps": 4, "total_steps": 4, "epoch": 2.0}
{"current_ste"#;

    #[test]
    fn lines_that_were_written_again_count_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trainer_log.jsonl");
        assert_eq!(read(&path).unwrap(), []);
        fs::write(&path, LOG).unwrap();
        let lines = read(&path).unwrap();
        assert_eq!(
            lines.iter().map(|l| (l.current_steps, l.loss)).collect::<Vec<_>>(),
            [(1, Some(3.0)), (2, Some(2.5)), (2, None), (3, Some(2.25))]
        );
        assert_eq!(lines[2].point().valid_loss, Some(2.0));
    }

    #[test]
    fn a_growing_log_is_followed_line_by_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trainer_log.jsonl");
        let mut watch = Watch::new(&path);
        assert_eq!(watch.look().unwrap(), None);
        fs::write(&path, &LOG[..100]).unwrap();
        assert_eq!(watch.look().unwrap(), Some((1, 4)));
        fs::write(&path, LOG).unwrap();
        assert_eq!(watch.look().unwrap(), Some((4, 4)));
        assert_eq!(watch.look().unwrap(), None);
    }

    #[test]
    fn a_loss_that_is_not_finite_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trainer_log.jsonl");
        for (field, value, what) in [
            ("loss", "NaN", "the loss is not finite at step 2"),
            ("loss", "Infinity", "the loss is not finite at step 2"),
            ("eval_loss", "-Infinity", "the validation loss is not finite at step 2"),
        ] {
            let line = format!(r#"{{"current_steps": 2, "total_steps": 3, "{field}": {value}, "note": "NaN"}}"#);
            fs::write(&path, format!("{}\n{line}\n", LOG.lines().next().unwrap())).unwrap();
            let found = [read(&path).err().unwrap(), Watch::new(&path).look().err().unwrap()];
            for error in found {
                assert_eq!(error.to_string(), what);
                assert!(error.help_text().unwrap().contains("`lr`"));
            }
            // A run that goes on from before that step may do better.
            rewind(&path, 1).unwrap();
            assert_eq!(read(&path).unwrap().len(), 1);
        }
    }
}
