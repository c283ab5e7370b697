//! Keeping account of what was dropped and mended; in strict mode the first drop is an error.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::StageError;

/// Examples kept of each reason.
const EXAMPLES: usize = 5;

/// The account of one input file.
#[derive(Debug, Serialize)]
pub struct Account {
    /// Records (items, or users) found.
    pub read: u64,
    pub kept: u64,
    /// What was left out, by reason.
    pub dropped: BTreeMap<&'static str, Finding>,
    /// What was changed, by reason.
    pub mended: BTreeMap<&'static str, Finding>,
    #[serde(skip)]
    path: PathBuf,
    #[serde(skip)]
    strict: bool,
}

#[derive(Debug, Default, Serialize)]
pub struct Finding {
    pub count: u64,
    pub examples: Vec<String>,
}

impl Finding {
    fn add(&mut self, example: impl FnOnce() -> String) {
        self.count += 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(example());
        }
    }
}

impl Account {
    pub fn new(path: &Path, strict: bool) -> Self {
        Self { read: 0, kept: 0, dropped: BTreeMap::new(), mended: BTreeMap::new(), path: path.to_owned(), strict }
    }

    /// Notes that something was left out.
    ///
    /// # Errors
    /// In strict mode.
    pub fn drop(&mut self, reason: &'static str, line: Option<u64>, example: &str) -> Result<(), StageError> {
        if self.strict {
            return Err(StageError::Input {
                path: self.path.clone(),
                line,
                message: format!("{example} ({})", reason.replace('_', " ")),
                help: Some("mend the file, or set `strict: false` to leave it out".into()),
            });
        }
        self.dropped.entry(reason).or_default().add(|| match line {
            Some(line) => format!("line {line}: {example}"),
            None => example.to_owned(),
        });
        Ok(())
    }

    /// Notes that something was changed.
    pub fn mend(&mut self, reason: &'static str, example: &str) {
        self.mended.entry(reason).or_default().add(|| example.to_owned());
    }

    /// One line a reason, for the log.
    pub fn lines(&self, what: &str) -> Vec<String> {
        let line = |verb: &str, (reason, finding): (&&'static str, &Finding)| {
            let example = finding.examples.first().map(|e| format!(" (first: {e})")).unwrap_or_default();
            format!("{what}: {} {verb}: {}{example}", finding.count, reason.replace('_', " "))
        };
        self.dropped.iter().map(|d| line("left out", d)).collect()
    }
}
