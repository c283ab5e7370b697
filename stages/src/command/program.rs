//! The user's program as a row function: started, given rows, its answers read and told apart by their ids.
//!
//! Answers are handed on as they come, so that whatever happens later they are kept. A program that ends badly in the
//! middle of a batch keeps what it answered. The first row that it did not answer is tried alone: if that ends badly
//! too, it is that row's fault, and the others go on; if nothing has ever been answered, it is the program's.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};

use serde_json::{Map, Value};

use super::{
    failure,
    rows::{Pass, Row, RowParams},
    talk::Talk,
};
use crate::{
    Device, StageError,
    rows::{RowDevice, RowFailure, RowFunction, RowResult},
};

/// Set to the cores of the device, where they hold the cores of the whole attempt.
const THREADS: [&str; 4] = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"];
/// Programs that ended badly with nothing answered, in a row, before the program itself is blamed.
const BROKEN: u32 = 3;
/// A line that is shown in an error.
const SHOWN: usize = 120;
/// A streaming program that says nothing for so long is asked about. One that loads a large model is asked in vain, which
/// costs it a line.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Program<'a> {
    run: &'a str,
    block: &'a RowParams,
    list: &'a [Row],
    device: RowDevice,
    threads: usize,
    /// For `pass: files`.
    folder: PathBuf,
    /// The program, unless it works on files.
    talk: Option<Talk>,
    /// Rows that the program was given last, by their ids.
    asked: HashMap<String, usize>,
    /// Those of them that it has not answered.
    open: BTreeSet<usize>,
    /// The next row is tried alone.
    alone: bool,
    answered: bool,
    bad_ends: u32,
    /// Why nothing can be asked any more; told once everything that was answered is kept.
    end: Option<StageError>,
}

/// Results, by rows.
type Given = Vec<(usize, RowResult)>;

impl<'a> Program<'a> {
    pub fn new(
        run: &'a str,
        block: &'a RowParams,
        list: &'a [Row],
        device: RowDevice,
        threads: usize,
        scratch: &Path,
    ) -> Result<Self, StageError> {
        let folder = scratch.join(format!("rows-{}", device.number));
        if block.pass == Pass::Files {
            fs::create_dir_all(&folder).map_err(|e| StageError::io("create", &folder, e))?;
        }
        Ok(Self {
            run,
            block,
            list,
            device,
            threads,
            folder,
            talk: None,
            asked: HashMap::new(),
            open: BTreeSet::new(),
            alone: false,
            answered: false,
            bad_ends: 0,
            end: None,
        })
    }

    /// The program, not yet started. It stays in the worker's process group, as every command does.
    fn command(&self) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", self.run]).env("GRLM_DEVICE", self.device.number.to_string());
        for name in THREADS {
            if std::env::var(name).is_ok_and(|value| value == self.threads.to_string()) {
                command.env(name, self.device.threads.to_string());
            }
        }
        if let Device::Cuda(number) = self.device.device
            && let Ok(visible) = std::env::var("CUDA_VISIBLE_DEVICES")
            && let Some(mine) = visible.split(',').nth(number)
        {
            command.env("CUDA_VISIBLE_DEVICES", mine);
        }
        command
    }

    /// Gives the program these rows, or the first of them alone.
    fn ask(&mut self, rows: &[usize]) -> io::Result<()> {
        let asked = if std::mem::take(&mut self.alone) { &rows[..1] } else { rows };
        self.asked = asked.iter().map(|&row| (self.list[row].id.to_string(), row)).collect();
        self.open = asked.iter().copied().collect();
        let mut lines = String::new();
        for &row in asked {
            lines.push_str(&self.list[row].line);
            lines.push('\n');
        }
        if self.block.pass == Pass::Files {
            return fs::write(self.folder.join("rows.jsonl"), lines);
        }
        let mut talk = match self.talk.take() {
            Some(talk) => talk,
            None => Talk::start(self.command())?,
        };
        talk.give(lines);
        if self.block.pass == Pass::Stdin {
            talk.close();
        }
        self.talk = Some(talk);
        Ok(())
    }

    /// The program's next lines, and how it ended, if it did.
    fn hear(&mut self) -> io::Result<(Vec<Vec<u8>>, Option<ExitStatus>)> {
        let Some(mut talk) = self.talk.take() else { return self.work_on_files() };
        let streams = self.block.pass == Pass::Stream;
        let wanted = if streams { self.open.len() } else { usize::MAX };
        let heard = talk.hear(wanted, &self.device.stop, PATIENCE, |time| {
            if streams {
                self.device.notes.warn(self.silence(time));
            }
        });
        if heard.ended {
            let status = talk.end(&self.device.stop)?;
            return Ok((whole(heard.lines, status), Some(status)));
        }
        self.talk = Some(talk);
        Ok((heard.lines, None))
    }

    fn silence(&self, time: Duration) -> String {
        let first = self.open.first().map(|&row| self.list[row].id.to_string()).unwrap_or_default();
        format!(
            "the program has said nothing for {} s; {} of {} rows wait for an answer, the first is {first}: does it \
             answer every row, and flush every line?",
            time.as_secs(),
            self.open.len(),
            self.asked.len(),
        )
    }

    fn work_on_files(&self) -> io::Result<(Vec<Vec<u8>>, Option<ExitStatus>)> {
        let (rows, answers) = (self.folder.join("rows.jsonl"), self.folder.join("answers.jsonl"));
        let _ = fs::remove_file(&answers);
        let mut command = self.command();
        command.env("GRLM_ROWS", &rows).env("GRLM_ANSWERS", &answers);
        let status = command.stdin(Stdio::null()).status()?;
        let text = match fs::read(&answers) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            text => text?,
        };
        let lines = text.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        Ok((whole(lines, status), Some(status)))
    }

    /// Reads answers, up to the first line that is none.
    fn take(&mut self, lines: &[Vec<u8>], given: &mut Given) -> Result<(), StageError> {
        for line in lines.iter().map(|line| line.trim_ascii()).filter(|line| !line.is_empty()) {
            let shown: String = String::from_utf8_lossy(line).chars().take(SHOWN).collect();
            let wrong = |what: &str| {
                let help = match self.block.pass {
                    Pass::Files => {
                        "the file `$GRLM_ANSWERS` holds answers alone: one JSON object a line, with the row's id"
                    }
                    Pass::Stdin | Pass::Stream => {
                        "on its standard output a program that works row by row writes answers alone: one JSON \
                         object a line, with the row's id; anything else belongs on standard error"
                    }
                };
                StageError::Command { message: format!("{what}: {shown}"), help: Some(help.into()) }
            };
            let mut answer: Map<String, Value> =
                serde_json::from_slice(line).map_err(|_| wrong("the program wrote a line that is no JSON object"))?;
            let id = answer.shift_remove(&self.block.id).ok_or_else(|| wrong("an answer has no id"))?;
            let row = self.asked.get(&id.to_string()).copied().ok_or_else(|| {
                let other = match &id {
                    Value::String(text) => text.clone(),
                    other => Value::String(other.to_string()).to_string(),
                };
                wrong(match self.asked.contains_key(&other) {
                    true => "an answer whose id is a text where the row's is a number, or the reverse",
                    false => "an answer to a row that was not asked",
                })
            })?;
            if !self.open.remove(&row) {
                return Err(wrong("a second answer to one row"));
            }
            given.push(match answer.get("error") {
                Some(Value::Null) | None => (row, Ok(Value::Object(answer).to_string().into_bytes())),
                Some(Value::String(message)) => self.failed(row, message),
                Some(other) => self.failed(row, &other.to_string()),
            });
            self.answered = true;
        }
        Ok(())
    }

    fn failed(&self, row: usize, message: &str) -> (usize, RowResult) {
        (row, Err(RowFailure::new(message).of(self.list[row].id.to_string())))
    }

    /// What the program's end means for the rows that it did not answer.
    fn ended(&mut self, status: ExitStatus, given: &mut Given) -> Result<(), StageError> {
        let rest = std::mem::take(&mut self.open);
        if status.success() {
            given.extend(rest.into_iter().map(|row| self.failed(row, "the program gave no answer")));
            return Ok(());
        }
        let error = failure(status);
        if matches!(error, StageError::Killed { .. }) {
            return Err(error);
        }
        if !self.answered {
            self.bad_ends += 1;
            if self.bad_ends >= BROKEN {
                return Err(error);
            }
        }
        let only = if self.asked.len() == 1 { rest.first() } else { None };
        self.alone = only.is_none() && !rest.is_empty();
        given.extend(only.map(|&row| self.failed(row, &error.to_string())));
        Ok(())
    }

    /// Hears the program until it has answered something, or an end comes of it.
    fn answers(&mut self, rows: &[usize], given: &mut Given) -> Result<(), StageError> {
        let failed = |e| StageError::io("run", "sh", e);
        loop {
            // One that was started for its batch alone is heard to its end before the next is.
            if self.open.is_empty() && (self.talk.is_none() || self.block.pass == Pass::Stream) {
                self.ask(rows).map_err(failed)?;
            }
            let (lines, status) = self.hear().map_err(failed)?;
            self.take(&lines, given)?;
            if self.device.stop.is_set() {
                return Err(StageError::Stopped);
            }
            if let Some(status) = status {
                self.ended(status, given)?;
            }
            if !given.is_empty() {
                return Ok(());
            }
        }
    }
}

/// Lines without the one that was cut off by a bad end.
fn whole(mut lines: Vec<Vec<u8>>, status: ExitStatus) -> Vec<Vec<u8>> {
    if !status.success() && lines.last().is_some_and(|line| !line.ends_with(b"\n")) {
        lines.pop();
    }
    lines
}

impl RowFunction for Program<'_> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        let mut given = Vec::new();
        match self.answers(rows, &mut given) {
            Err(error) if given.is_empty() => return Err(error),
            outcome => self.end = outcome.err(),
        }
        Ok(given)
    }

    fn end(&mut self) -> Option<StageError> {
        self.end.take()
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        match self.talk.take() {
            // It would work on for nothing.
            Some(talk) if self.device.stop.is_set() || !self.open.is_empty() => talk.kill(),
            // The end of its input is the program's sign to end.
            Some(talk) => drop(talk.end(&self.device.stop)),
            None => {}
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}
