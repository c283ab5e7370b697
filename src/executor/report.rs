//! What a worker reports, as lines of its stage's log, beside what its programs print there.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use grlm_stages::event::LogLevel;

use crate::{
    events::{Body, human_bytes, human_duration, now},
    journal::{CalendarStyle, utc},
};

/// Between two lines of progress.
const EVERY: Duration = Duration::from_secs(10);
/// Ends the time of a reported line. Unlikely in what programs print, so that the two can be told apart.
const MARK: &str = " grlm] ";

/// Writes into the log of one attempt. A log that cannot be written (a full disk) must not fail the stage.
pub struct Report {
    path: PathBuf,
    file: Option<File>,
    last_progress: Instant,
    /// The latest progress that has no line yet.
    held: Option<String>,
}

impl Report {
    /// Of an attempt that starts now.
    pub fn new(log: &Path) -> Self {
        Self { path: log.to_owned(), file: None, last_progress: Instant::now(), held: None }
    }

    /// Writes a line for what is worth one; progress gets one in ten seconds, and the last when the attempt ends.
    pub fn tell(&mut self, body: &Body) {
        if let Body::Progress { done, total, unit } = body {
            self.held = Some(progress(*done, *total, unit));
            if self.last_progress.elapsed() >= EVERY {
                self.flush_progress();
            }
        } else if let Some(text) = in_words(body) {
            self.write(&text);
        }
    }

    /// Writes how the attempt ended.
    pub fn end(&mut self, body: &Body) {
        self.flush_progress();
        self.tell(body);
    }

    fn flush_progress(&mut self) {
        if let Some(text) = self.held.take() {
            self.last_progress = Instant::now();
            self.write(&text);
        }
    }

    fn write(&mut self, text: &str) {
        if let Err(error) = self.append(text) {
            tracing::warn!(%error, log = %self.path.display(), "a report is missing in the log");
        }
    }

    fn append(&mut self, text: &str) -> io::Result<()> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => OpenOptions::new().create(true).read(true).append(true).open(&self.path)?,
        };
        // A program may have stopped in the middle of a line.
        let mut lines = if ends_with_a_whole_line(&file)? { String::new() } else { "\n".to_owned() };
        let time = utc(now() as u64, &CalendarStyle::Readable);
        for line in text.lines() {
            lines.push_str(&format!("[{time}{MARK}{line}\n"));
        }
        file.write_all(lines.as_bytes())?;
        self.file = Some(file);
        Ok(())
    }
}

/// Whether a line of a log was reported and not printed.
pub fn is_reported(line: &str) -> bool {
    line.starts_with('[') && line.get(20..).is_some_and(|rest| rest.starts_with(MARK))
}

fn ends_with_a_whole_line(file: &File) -> io::Result<bool> {
    let Some(last) = file.metadata()?.len().checked_sub(1) else { return Ok(true) };
    let mut byte = [0];
    file.read_exact_at(&mut byte, last)?;
    Ok(byte == *b"\n")
}

fn progress(done: u64, total: u64, unit: &str) -> String {
    let amount = |n: u64| if unit == "byte" { human_bytes(n) } else { n.to_string() };
    let of = if total == 0 { String::new() } else { format!(" of {}", amount(total)) };
    let units = if unit == "byte" { String::new() } else { format!(" {unit}s") };
    format!("progress: {}{of}{units}", amount(done))
}

fn in_words(body: &Body) -> Option<String> {
    Some(match body {
        Body::Log { level: LogLevel::Info, message } => format!("info: {message}"),
        Body::Log { level: LogLevel::Warn, message } => format!("warning: {message}"),
        Body::Metric { name, value, step } => {
            let value = value.map_or_else(|| "not a number".to_owned(), |value| value.to_string());
            let step = step.map(|step| format!(" at step {step}")).unwrap_or_default();
            format!("metric: {name} {value}{step}")
        }
        Body::Failed { message, help, .. } => {
            let help = help.as_ref().map(|help| format!("\nhelp: {help}")).unwrap_or_default();
            format!("error: {message}{help}")
        }
        Body::Finished { seconds, .. } => format!("done in {}", human_duration(Duration::from_secs_f64(*seconds))),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use grlm_stages::Failure;

    use super::*;

    fn lines(log: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(log).unwrap();
        text.lines().map(|line| line.split_once(MARK).map_or(line, |(_, rest)| rest).to_owned()).collect()
    }

    #[test]
    fn what_is_reported_stands_in_the_log_line_by_line() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("s.1.log");
        std::fs::write(&log, "printed, and then\nhalf a li").unwrap();
        let mut report = Report::new(&log);
        report.tell(&Body::Log { level: LogLevel::Warn, message: "74 users left out".into() });
        report.tell(&Body::Metric { name: "loss".into(), value: Some(2.5), step: Some(10) });
        for done in 1..=9 {
            report.tell(&Body::Progress { done, total: 9, unit: "step".into() });
        }
        report.end(&Body::Failed {
            failure: Failure::WrongInput,
            message: "no item".into(),
            help: Some("give one".into()),
            tail: Vec::new(),
            seconds: 1.0,
            retry_in: None,
        });
        assert_eq!(
            lines(&log),
            [
                "printed, and then",
                "half a li",
                "warning: 74 users left out",
                "metric: loss 2.5 at step 10",
                "progress: 9 of 9 steps",
                "error: no item",
                "help: give one",
            ]
        );
        let text = std::fs::read_to_string(&log).unwrap();
        assert_eq!(text.lines().filter(|line| is_reported(line)).count(), 5, "{text}");
    }

    #[test]
    fn progress_has_a_line_in_ten_seconds() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("s.1.log");
        let mut report = Report::new(&log);
        report.last_progress = Instant::now().checked_sub(EVERY).unwrap();
        for done in 1..=3 {
            report.tell(&Body::Progress { done: done << 20, total: 0, unit: "byte".into() });
        }
        assert_eq!(lines(&log), ["progress: 1.0 MiB"]);
    }
}
