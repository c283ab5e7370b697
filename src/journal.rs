//! The record of runs: `runs/<id>/` in the store, with `run.json`, `plan.json`, `events.jsonl` and `logs/`. It
//! survives everything, and tells a run that died from one that still goes on.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

pub use grlm_cache::ProcessId;
use serde::{Deserialize, Serialize};

use crate::events::{Body, Counts, Event, Outcome};

/// The name of a run: its start in UTC and four random hexadecimal digits, so that names sort by time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(String);

impl RunId {
    /// A new one for a run that starts now.
    pub fn generate() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let noise = since.subsec_nanos().wrapping_mul(2_654_435_761) ^ std::process::id().wrapping_mul(40_503);
        Self(format!("{}-{:04x}", utc(since.as_secs(), &CalendarStyle::Compact), (noise >> 16) & 0xffff))
    }

    /// `None` if this is no run's name.
    pub fn parse(text: &str) -> Option<Self> {
        let (time, noise) = text.split_once('-')?;
        let (date, clock) = time.split_once('T')?;
        let digits = |s: &str, n: usize| s.len() == n && s.bytes().all(|b| b.is_ascii_digit());
        let well_formed = digits(date, 8)
            && digits(clock, 6)
            && noise.len() == 4
            && noise.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        well_formed.then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for RunId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("`{text}` is not the name of a run"))
    }
}

impl From<RunId> for String {
    fn from(id: RunId) -> Self {
        id.0
    }
}

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// How [`utc`] writes a time.
pub enum CalendarStyle {
    /// `20260102T030405`
    Compact,
    /// `2026-01-02 03:04:05`
    Readable,
}

/// A time in seconds since 1970 as a date and time of day in UTC.
pub fn utc(seconds: u64, style: &CalendarStyle) -> String {
    // Days to year, month, day: https://howardhinnant.github.io/date_algorithms.html#civil_from_days
    let z = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (h, m, s) = (seconds % 86_400 / 3600, seconds % 3600 / 60, seconds % 60);
    match style {
        CalendarStyle::Compact => format!("{year:04}{month:02}{day:02}T{h:02}{m:02}{s:02}"),
        CalendarStyle::Readable => format!("{year:04}-{month:02}-{day:02} {h:02}:{m:02}:{s:02}"),
    }
}

/// `run.json`: written when the run starts, and again when it ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    pub version: u32,
    pub id: RunId,
    pub pipeline: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// What its user calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The command line.
    pub command: Vec<String>,
    pub started: f64,
    pub process: ProcessId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<RunEnd>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunEnd {
    pub t: f64,
    pub outcome: Outcome,
    pub counts: Counts,
}

/// What became of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    Running,
    Ended(Outcome),
    /// Its process is gone without a word.
    Died,
    /// It ran, or runs, on another machine.
    Elsewhere,
}

impl RunRecord {
    pub fn state(&self) -> RunState {
        match &self.ended {
            Some(end) => RunState::Ended(end.outcome),
            None => match self.process.is_alive() {
                Some(true) => RunState::Running,
                Some(false) => RunState::Died,
                None => RunState::Elsewhere,
            },
        }
    }
}

/// A file of the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct JournalError {
    pub action: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

impl JournalError {
    fn new(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { action, path: path.to_owned(), source }
    }
}

/// The journal of the run that is going on.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    record: RunRecord,
    events: BufWriter<File>,
}

impl Journal {
    /// Starts `runs/<id>/` below `runs`, with a name that no other run has.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub fn create(
        runs: &Path,
        pipeline: &str,
        variant: Option<&str>,
        command: Vec<String>,
    ) -> Result<Self, JournalError> {
        let (id, folder) = claim(runs, RunId::generate)?;
        let logs = folder.join("logs");
        fs::create_dir(&logs).map_err(JournalError::new("create", &logs))?;
        let path = folder.join("events.jsonl");
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let events = BufWriter::new(file.map_err(JournalError::new("create", &path))?);
        let record = RunRecord {
            version: crate::events::VERSION,
            id,
            pipeline: pipeline.to_owned(),
            variant: variant.map(str::to_owned),
            name: None,
            command,
            started: crate::events::now(),
            process: ProcessId::own(),
            ended: None,
        };
        let journal = Self { folder, record, events };
        journal.write_record()?;
        Ok(journal)
    }

    /// Gives the run a name.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn set_name(&mut self, name: &str) -> Result<(), JournalError> {
        self.record.name = Some(name.to_owned());
        self.write_record()
    }

    pub fn id(&self) -> &RunId {
        &self.record.id
    }

    /// The log of one attempt. A stage's name may hold characters that file names must not.
    pub fn log(&self, stage: &str, attempt: u32) -> PathBuf {
        log_path(&self.folder, stage, attempt)
    }

    /// # Errors
    /// If the file cannot be written.
    pub fn write_plan(&self, plan: &impl Serialize) -> Result<(), JournalError> {
        self.write_json("plan.json", plan)
    }

    /// Appends an event. Events that end something are flushed at once, with all before them; the rest at the
    /// latest with the next of those, or at [`Journal::flush`].
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn append(&mut self, event: &Event) -> Result<(), JournalError> {
        let path = || self.folder.join("events.jsonl");
        let mut write = || -> io::Result<()> {
            serde_json::to_writer(&mut self.events, event)?;
            self.events.write_all(b"\n")?;
            match event.body {
                Body::Cached { .. } | Body::Queued { .. } | Body::Progress { .. } | Body::Skipped { .. } => Ok(()),
                _ => self.events.flush(),
            }
        };
        let written = write();
        written.map_err(|e| JournalError::new("write", &path())(e))?;
        if let Body::RunFinished { outcome, counts, .. } = event.body {
            self.record.ended = Some(RunEnd { t: event.t, outcome, counts });
            self.write_record()?;
        }
        Ok(())
    }

    /// # Errors
    /// If the file cannot be written.
    pub fn flush(&mut self) -> Result<(), JournalError> {
        self.events.flush().map_err(JournalError::new("write", &self.folder.join("events.jsonl")))
    }

    fn write_record(&self) -> Result<(), JournalError> {
        self.write_json("run.json", &self.record)
    }

    /// Readers see the old file or the new one, whole.
    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), JournalError> {
        let path = self.folder.join(name);
        let staged = self.folder.join(format!(".{name}"));
        let write = || -> io::Result<()> {
            fs::write(&staged, serde_json::to_vec_pretty(value)?)?;
            fs::rename(&staged, &path)
        };
        write().map_err(JournalError::new("write", &path))
    }
}

/// Makes the folder of a run, and with it the run's name its own: two runs of one second may come to the same name.
fn claim(runs: &Path, mut name: impl FnMut() -> RunId) -> Result<(RunId, PathBuf), JournalError> {
    fs::create_dir_all(runs).map_err(JournalError::new("create", runs))?;
    loop {
        let id = name();
        let folder = runs.join(id.as_str());
        match fs::create_dir(&folder) {
            Ok(()) => return Ok((id, folder)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(JournalError::new("create", &folder)(error)),
        }
    }
}

fn log_path(folder: &Path, stage: &str, attempt: u32) -> PathBuf {
    folder.join("logs").join(format!("{}.{attempt}.log", file_name(stage)))
}

/// `a/b` and `..` must not lead out of the folder, and different names must stay different.
fn file_name(stage: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '@' | '=' | ',' | '[' | ']' | '.');
    if !stage.starts_with('.') && stage.len() <= 120 && stage.chars().all(safe) {
        return stage.to_owned();
    }
    let head: String = stage.chars().filter(char::is_ascii_alphanumeric).take(60).collect();
    format!("{head}~{}", &blake3::hash(stage.as_bytes()).to_hex()[..16])
}

/// Reads what earlier runs left.
#[derive(Debug, Clone)]
pub struct Runs {
    folder: PathBuf,
}

impl Runs {
    /// `folder` is the store's `runs`; it need not exist.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// Names of all runs, oldest first.
    pub fn list(&self) -> Vec<RunId> {
        let Ok(entries) = fs::read_dir(&self.folder) else { return Vec::new() };
        let mut ids: Vec<RunId> = entries.flatten().filter_map(|e| RunId::parse(e.file_name().to_str()?)).collect();
        ids.sort();
        ids
    }

    /// # Errors
    /// If `run.json` is missing or no record of a run.
    pub fn record(&self, id: &RunId) -> Result<RunRecord, JournalError> {
        let path = self.folder.join(id.as_str()).join("run.json");
        let read = || -> io::Result<RunRecord> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
        read().map_err(JournalError::new("read", &path))
    }

    /// All events of a run. A last line that was cut off by a crash is left out, and so is what a newer grlm wrote.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn events(&self, id: &RunId) -> Result<Vec<Event>, JournalError> {
        let path = self.events_path(id);
        let file = File::open(&path).map_err(JournalError::new("read", &path))?;
        let lines = BufReader::new(file).split(b'\n').map_while(Result::ok);
        Ok(lines.filter_map(|line| serde_json::from_slice(&line).ok()).collect())
    }

    /// Forgets a run: its journal and its logs. One that is gone already, or goes meanwhile, is forgotten as well.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn remove(&self, id: &RunId) -> Result<(), JournalError> {
        let folder = self.folder.join(id.as_str());
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(JournalError::new("remove", &folder)(error)),
            _ => Ok(()),
        }
    }

    /// Whether the run said anything in the last day: of one on another machine, that is all that can be seen.
    pub fn is_fresh(&self, id: &RunId) -> bool {
        const QUIET: std::time::Duration = std::time::Duration::from_secs(24 * 3600);
        let said = fs::metadata(self.events_path(id)).and_then(|metadata| metadata.modified());
        said.is_ok_and(|said| said.elapsed().is_ok_and(|ago| ago < QUIET))
    }

    pub fn events_path(&self, id: &RunId) -> PathBuf {
        self.folder.join(id.as_str()).join("events.jsonl")
    }

    /// The log of an attempt; it need not exist.
    pub fn log(&self, id: &RunId, stage: &str, attempt: u32) -> PathBuf {
        log_path(&self.folder.join(id.as_str()), stage, attempt)
    }

    /// Numbers of the attempts of a stage that left a log, ascending.
    pub fn attempts(&self, id: &RunId, stage: &str) -> Vec<u32> {
        let prefix = format!("{}.", file_name(stage));
        let Ok(entries) = fs::read_dir(self.folder.join(id.as_str()).join("logs")) else { return Vec::new() };
        let mut attempts: Vec<u32> = entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.strip_prefix(&prefix)?.strip_suffix(".log")?.parse().ok())
            .collect();
        attempts.sort_unstable();
        attempts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &RunId, stage: Option<&str>, body: Body) -> Event {
        Event { t: crate::events::now(), run: id.clone(), stage: stage.map(str::to_owned), attempt: None, body }
    }

    #[test]
    fn dates_are_right() {
        let at = |s| utc(s, &CalendarStyle::Readable);
        assert_eq!(at(0), "1970-01-01 00:00:00");
        assert_eq!(at(951_782_399), "2000-02-28 23:59:59");
        assert_eq!(at(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(at(1_735_689_599), "2024-12-31 23:59:59");
        assert_eq!(utc(1_735_689_600, &CalendarStyle::Compact), "20250101T000000");
        assert!(RunId::parse(RunId::generate().as_str()).is_some());
        assert!(["", "x", "20250101T000000-zzzz", "../20250101T000000-abcd"].iter().all(|t| RunId::parse(t).is_none()));
    }

    #[test]
    fn a_run_is_recorded_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let runs = Runs::new(folder.path());
        let mut journal = Journal::create(folder.path(), "p", Some("v"), vec!["grlm".into()]).unwrap();
        let id = journal.id().clone();
        assert_eq!(runs.record(&id).unwrap().state(), RunState::Running);
        journal.append(&event(&id, Some("a"), Body::Cached { saved: None, key: None })).unwrap();
        let counts = Counts { cached: 1, ..Counts::default() };
        let end = Body::RunFinished { outcome: Outcome::Succeeded, counts, seconds: 0.1 };
        journal.append(&event(&id, None, end)).unwrap();
        fs::write(journal.log("a", 2), "x").unwrap();
        OpenOptions::new()
            .append(true)
            .open(runs.events_path(&id))
            .and_then(|mut f| f.write_all(b"{\"t\":1,\"ru"))
            .unwrap();
        assert_eq!(runs.list(), std::slice::from_ref(&id));
        assert_eq!(runs.events(&id).unwrap().len(), 2);
        assert_eq!(runs.attempts(&id, "a"), [2]);
        let record = runs.record(&id).unwrap();
        assert_eq!(record.state(), RunState::Ended(Outcome::Succeeded));
        assert_eq!(record.ended.map(|e| e.counts), Some(counts));
        runs.remove(&id).unwrap();
        runs.remove(&id).unwrap();
        assert!(runs.list().is_empty());
    }

    #[test]
    fn runs_of_one_second_that_come_to_one_name_get_two() {
        let folder = tempfile::tempdir().unwrap();
        let runs = folder.path().join("runs");
        let ids = ["00ff", "00ff", "0100"].map(|noise| RunId::parse(&format!("20250101T000000-{noise}")).unwrap());
        let mut names = ids.clone().into_iter();
        let mut claimed = || claim(&runs, || names.next().unwrap()).unwrap().0;
        assert_eq!([claimed(), claimed()], [ids[0].clone(), ids[2].clone()]);
        assert_eq!(Runs::new(runs).list().len(), 2);
    }

    #[test]
    fn stage_names_cannot_leave_the_folder_or_collide() {
        assert_eq!(file_name("lr[train.with.lr=1e-4]"), "lr[train.with.lr=1e-4]");
        for name in ["../x", "a/b", ".", "", "ä", &"x".repeat(500)] {
            let file = file_name(name);
            assert!(file.is_empty() == name.is_empty() && !file.contains('/') && file.len() < 120, "{file}");
        }
        assert_ne!(file_name("a/b"), file_name("a.b"));
        assert_ne!(file_name("a/b"), file_name("ab"));
    }
}
