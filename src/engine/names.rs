//! Paths of an attempt as its user knows them. A worker reads copies in the attempt's folder, which is gone when its
//! message is read.

use grlm_stages::WorkerEvent;

use super::attempt::{Job, JobInput};
use crate::executor::{AttemptFailure, AttemptSpec};

/// What help texts say of the log; the stages do not know what they are called.
const ANY_LOG: &str = "grlm logs STAGE";

/// Replaces the paths of an attempt's inputs.
#[derive(Debug)]
pub struct Names {
    /// A path and what stands for it, the longest path first.
    known: Vec<(String, String)>,
    /// The stage's own log.
    log: String,
}

impl Names {
    pub fn new(job: &Job, spec: &AttemptSpec) -> Self {
        let mut known = Vec::new();
        for (port, input) in &job.inputs {
            let path = spec.inputs[port].display().to_string();
            match input {
                JobInput::File(file) => known.push((path, file.display().to_string())),
                JobInput::Stored { file, from } => {
                    known.push((format!("{path}/"), format!("{from}/")));
                    known.push((path, format!("{from} ({file})")));
                }
            }
        }
        known.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        Self { known, log: format!("grlm logs {}", job.label) }
    }

    pub fn in_failure(&self, failure: AttemptFailure) -> AttemptFailure {
        let help = failure.help.map(|help| self.in_text(&help).replace(ANY_LOG, &self.log));
        AttemptFailure { message: self.in_text(&failure.message), help, ..failure }
    }

    pub fn in_event(&self, event: WorkerEvent) -> WorkerEvent {
        match event {
            WorkerEvent::Log { level, message } => WorkerEvent::Log { level, message: self.in_text(&message) },
            event => event,
        }
    }

    fn in_text(&self, text: &str) -> String {
        self.known.iter().fold(text.to_owned(), |text, (path, name)| replace(&text, path, name))
    }
}

/// Replaces a path, but not a part of a longer one.
fn replace(text: &str, path: &str, name: &str) -> String {
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(path) {
        let after = &rest[at + path.len()..];
        replaced.push_str(&rest[..at]);
        let begun = replaced.ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '/'));
        let goes_on = after.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '-'));
        replaced.push_str(if begun || (goes_on && !path.ends_with('/')) { path } else { name });
        rest = after;
    }
    replaced + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_called_what_they_are_copies_of() {
        let names = Names {
            known: vec![
                ("/s/in/tids/id.json/".into(), "tid.tids/".into()),
                ("/s/in/tids/id.json".into(), "tid.tids (id.json)".into()),
                ("/w/items".into(), "items".into()),
            ],
            log: "grlm logs train@a".into(),
        };
        let say = |text: &str| names.in_text(text);
        assert_eq!(say("`/s/in/tids/id.json:1`: no item"), "`tid.tids (id.json):1`: no item");
        assert_eq!(say("cannot read /s/in/tids/id.json/part.1"), "cannot read tid.tids/part.1");
        assert_eq!(say("/w/items, /w/items-2 and /w/items/a.b"), "items, /w/items-2 and items/a.b");
        assert_eq!(say("/mnt/w/items is another"), "/mnt/w/items is another");
        let failure = AttemptFailure {
            failure: grlm_stages::Failure::Command,
            message: "ended".into(),
            help: Some("see `grlm logs STAGE`".into()),
            tail: Vec::new(),
        };
        assert_eq!(names.in_failure(failure).help.as_deref(), Some("see `grlm logs train@a`"));
    }
}
