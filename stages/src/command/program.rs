//! The user's program as a row function: started, given rows, its answers read and told apart by their ids.
//!
//! A program that ends badly in the middle of a batch keeps what it answered. The first row that it did not answer is
//! tried alone: if that ends badly too, it is that row's fault, and the others go on; if nothing has ever been
//! answered, it is the program's.

use std::{
    collections::HashMap,
    fs,
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, ExitStatus, Stdio},
};

use serde_json::{Map, Value};

use super::{
    failure,
    rows::{Pass, Row, RowParams},
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

pub(super) struct Program<'a> {
    run: &'a str,
    block: &'a RowParams,
    list: &'a [Row],
    device: RowDevice,
    threads: usize,
    /// For `pass: files`.
    folder: PathBuf,
    /// For `pass: stream`.
    running: Option<Running>,
    answered: bool,
    bad_ends: u32,
}

/// A program that waits for its next rows.
struct Running {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

/// What became of a batch.
struct Outcome {
    /// Lines that the program wrote.
    lines: Vec<String>,
    /// How it ended; `None` if it waits for more.
    status: Option<ExitStatus>,
}

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
        Ok(Self { run, block, list, device, threads, folder, running: None, answered: false, bad_ends: 0 })
    }

    /// The program, not yet started. It stays in the worker's process group, as every command does.
    fn command(&self) -> std::process::Command {
        let mut command = std::process::Command::new("sh");
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

    /// Lets the program work on these rows.
    fn pass(&mut self, rows: &[usize]) -> Result<Outcome, StageError> {
        let mut lines = String::new();
        for &row in rows {
            lines.push_str(&self.list[row].line);
            lines.push('\n');
        }
        let outcome = match self.block.pass {
            Pass::Stdin => self.pass_stdin(&lines),
            Pass::Files => self.pass_files(&lines),
            Pass::Stream => self.pass_stream(&lines, rows.len()),
        };
        outcome.map_err(|e| StageError::io("run", "sh", e))
    }

    fn pass_stdin(&self, lines: &str) -> io::Result<Outcome> {
        let mut child = self.command().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let answers = std::thread::scope(|scope| {
            scope.spawn(move || {
                // A program may end without reading everything.
                let _ = stdin.map(|mut stdin| stdin.write_all(lines.as_bytes()));
            });
            stdout.map_or(Ok(Vec::new()), |stdout| BufReader::new(stdout).lines().collect())
        });
        let status = child.wait()?;
        Ok(Outcome { lines: answers?, status: Some(status) })
    }

    fn pass_files(&self, lines: &str) -> io::Result<Outcome> {
        let (rows, answers) = (self.folder.join("rows.jsonl"), self.folder.join("answers.jsonl"));
        fs::write(&rows, lines)?;
        let _ = fs::remove_file(&answers);
        let mut command = self.command();
        command.env("GRLM_ROWS", &rows).env("GRLM_ANSWERS", &answers);
        let status = command.stdin(Stdio::null()).status()?;
        let text = match fs::read_to_string(&answers) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        // After a bad end the last line may be half a line.
        let whole = if status.success() { text.as_str() } else { &text[..text.rfind('\n').map_or(0, |at| at + 1)] };
        Ok(Outcome { lines: whole.lines().map(str::to_owned).collect(), status: Some(status) })
    }

    fn pass_stream(&mut self, lines: &str, wanted: usize) -> io::Result<Outcome> {
        let mut running = match self.running.take() {
            Some(running) => running,
            None => {
                let mut child = self.command().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
                let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
                    return Err(io::ErrorKind::BrokenPipe.into());
                };
                Running { child, stdin, stdout: BufReader::new(stdout) }
            }
        };
        let (stdin, stdout) = (&mut running.stdin, &mut running.stdout);
        let answers = std::thread::scope(|scope| -> io::Result<Vec<String>> {
            scope.spawn(move || {
                let _ = stdin.write_all(lines.as_bytes()).and_then(|()| stdin.flush());
            });
            let mut answers = Vec::new();
            while answers.len() < wanted {
                let mut line = String::new();
                if stdout.read_line(&mut line)? == 0 {
                    break;
                }
                if line.ends_with('\n') && !line.trim().is_empty() {
                    answers.push(line);
                }
            }
            Ok(answers)
        })?;
        if answers.len() == wanted {
            self.running = Some(running);
            return Ok(Outcome { lines: answers, status: None });
        }
        drop(running.stdin);
        Ok(Outcome { lines: answers, status: Some(running.child.wait()?) })
    }

    /// Reads answers into `results`.
    fn take(
        &self,
        lines: &[String],
        numbers: &HashMap<String, usize>,
        results: &mut HashMap<usize, RowResult>,
    ) -> Result<(), StageError> {
        for line in lines.iter().map(|line| line.trim()).filter(|line| !line.is_empty()) {
            let shown: String = line.chars().take(SHOWN).collect();
            let wrong = |what: &str| {
                let help = "on its standard output a program that works row by row writes answers alone: one JSON \
                            object a line, with the row's id; anything else belongs on standard error";
                StageError::Command { message: format!("{what}: {shown}"), help: Some(help.into()) }
            };
            let mut answer: Map<String, Value> =
                serde_json::from_str(line).map_err(|_| wrong("the program wrote a line that is no JSON object"))?;
            let id = answer.shift_remove(&self.block.id).ok_or_else(|| wrong("an answer has no id"))?;
            let row = *numbers.get(&id.to_string()).ok_or_else(|| wrong("an answer to a row that was not asked"))?;
            let result = match answer.get("error") {
                Some(Value::String(message)) => Err(RowFailure::new(format!("{id}: {message}"))),
                Some(Value::Null) | None => Ok(Value::Object(answer).to_string().into_bytes()),
                Some(other) => Err(RowFailure::new(format!("{id}: {other}"))),
            };
            if results.insert(row, result).is_some() {
                return Err(wrong("a second answer to one row"));
            }
        }
        Ok(())
    }
}

impl RowFunction for Program<'_> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<RowResult>, StageError> {
        let numbers: HashMap<String, usize> = rows.iter().map(|&row| (self.list[row].id.to_string(), row)).collect();
        let mut results: HashMap<usize, RowResult> = HashMap::with_capacity(rows.len());
        let mut alone = false;
        loop {
            let open: Vec<usize> = rows.iter().copied().filter(|row| !results.contains_key(row)).collect();
            let Some(&first) = open.first() else { break };
            let asked = if alone { &open[..1] } else { &open[..] };
            let outcome = self.pass(asked)?;
            let before = results.len();
            self.take(&outcome.lines, &numbers, &mut results)?;
            if results.len() > before {
                (self.answered, self.bad_ends) = (true, 0);
            }
            if self.device.stop.is_set() {
                return Err(StageError::Stopped);
            }
            let Some(status) = outcome.status else { continue };
            if status.success() {
                for row in asked.iter().filter(|row| !results.contains_key(row)).copied().collect::<Vec<_>>() {
                    let id = &self.list[row].id;
                    results.insert(row, Err(RowFailure::new(format!("{id}: the program gave no answer"))));
                }
                alone = false;
                continue;
            }
            let error = failure(status);
            if matches!(error, StageError::Killed { .. }) {
                return Err(error);
            }
            if results.len() == before && !self.answered {
                self.bad_ends += 1;
                if self.bad_ends >= BROKEN {
                    return Err(error);
                }
            }
            if asked.len() == 1 && !results.contains_key(&first) {
                let id = &self.list[first].id;
                results.insert(first, Err(RowFailure::new(format!("{id}: {error}"))));
                alone = false;
            } else {
                alone = true;
            }
        }
        Ok(rows.iter().filter_map(|row| results.remove(row)).collect())
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        if let Some(Running { mut child, stdin, .. }) = self.running.take() {
            // The end of its input is the program's sign to end.
            drop(stdin);
            if self.device.stop.is_set() {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}
