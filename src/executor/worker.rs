//! The worker: reads `attempt.json`, runs the stage, tells the launcher what happens. Nothing else: no actions, no
//! keys, no retries. Of the store it uses the rows alone.
//!
//! Its standard input is the channel for events, one JSON object a line; started by hand, with no channel, it writes
//! them to `events.jsonl` in the attempt's folder. Its standard error goes wherever the launcher put it, and takes what is
//! printed as well: the standard output that a launcher gives is a file to be held open ([`HELD`]).
//!
//! It leads a process group of its own, which everything it starts stays in. When the process that started it dies,
//! the kernel sends [`PARENT_DEATH`], and the worker kills what it started, then the whole group, itself included.
//! SIGTERM only sets the [`StopFlag`].

use std::{
    any::Any,
    collections::BTreeSet,
    fs::File,
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use grlm_stages::{StageContext, StageError, StopFlag, WorkerEvent};
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use super::{
    AttemptSpec, process,
    rows::{Namespaces, StoreRows},
};

/// One line from the worker to the launcher.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    Event(WorkerEvent),
    /// Sent just before the last event.
    Usage {
        /// In bytes, of the worker or the largest of its children.
        peak_memory: u64,
        /// Namespaces of rows that the stage used.
        rows: BTreeSet<String>,
    },
}

/// Not used by anything else in the worker; programs that it starts have no handler for it and are not sent it.
pub const PARENT_DEATH: Signal = Signal::USR2;

/// Frames of deep recursion (JSON, tries) must fit; pages are only taken when touched.
const STACK: usize = 256 << 20;

/// More frequent progress than this is left out.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// What the launcher gave as standard output: the file whose lock says what is leased. A lock lasts until the last copy
/// of its descriptor is closed, so that a lease outlives a launcher that was killed, until this process is gone too. What
/// this process starts gets no copy: a server that a command leaves behind would keep the lease.
static HELD: OnceLock<OwnedFd> = OnceLock::new();
static STOP: OnceLock<StopFlag> = OnceLock::new();
/// Wakes the thread that waits for the stage: [`STAGE_ENDED`], or [`PARENT_DIED`], about which a handler may do no more.
static WAKE: OnceLock<PipeWriter> = OnceLock::new();
const STAGE_ENDED: u8 = 0;
const PARENT_DIED: u8 = 1;
static PANIC_PLACE: Mutex<Option<String>> = Mutex::new(None);

extern "C" fn on_terminate(_: libc::c_int) {
    if let Some(flag) = STOP.get() {
        flag.stop();
    }
}

extern "C" fn on_parent_death(_: libc::c_int) {
    if !wake(PARENT_DIED) {
        let _ = rustix::process::kill_current_process_group(Signal::KILL);
    }
}

fn wake(why: u8) -> bool {
    WAKE.get().is_some_and(|wake| rustix::io::write(wake, &[why]).is_ok())
}

/// Ends what this process started, and then this process: the lease is to last as long as anything uses it.
fn end_everything() {
    process::kill_children();
    let _ = rustix::process::kill_current_process_group(Signal::KILL);
}

/// Runs the attempt of `folder` to its end. `parent` is the process to die with, if any.
pub fn main(folder: &Path, parent: Option<u32>) -> ExitCode {
    let channel = match take_streams(folder, parent.is_some()) {
        Ok(channel) => Arc::new(Mutex::new(channel)),
        Err(error) => {
            eprintln!("cannot take over the standard streams: {error}");
            return ExitCode::FAILURE;
        }
    };
    let stop = STOP.get_or_init(StopFlag::default).clone();
    let namespaces = Namespaces::default();
    let result = guard_process(parent).and_then(|woken| run(folder, stop, &channel, &namespaces, woken));
    process::kill_children();
    let (last, code) = match result {
        Ok(()) => (WorkerEvent::Finished, ExitCode::SUCCESS),
        Err(error) => {
            let help = error.help_text().map(str::to_owned);
            let message = with_causes(&error);
            (WorkerEvent::Failed { failure: error.failure(), message, help }, ExitCode::FAILURE)
        }
    };
    let peak_memory = process::own_peak_memory().unwrap_or(0).max(process::children_usage().peak_memory);
    let mut channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
    channel.flush_progress();
    let rows = namespaces.lock().unwrap_or_else(PoisonError::into_inner).clone();
    channel.send(&Message::Usage { peak_memory, rows });
    channel.send(&Message::Event(last));
    code
}

/// The channel for events; a launched worker also holds what it was given to hold.
fn take_streams(folder: &Path, launched: bool) -> io::Result<Channel> {
    if launched {
        let _ = HELD.set(process::take_stdout()?);
    }
    let stdin = process::take_stdin()?;
    let is_socket = rustix::fs::fstat(stdin.as_fd())
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Socket);
    let file = if is_socket { File::from(stdin) } else { File::create(folder.join("events.jsonl"))? };
    Ok(Channel { file, last_progress: None, held: None })
}

/// Own process group, stop flag, death of the parent, adoption of what daemonises itself. With a parent, returns what
/// [`wake`] writes to.
fn guard_process(parent: Option<u32>) -> Result<Option<PipeReader>, StageError> {
    let refused = |e: io::Error| StageError::bug(format!("cannot set up the worker process: {e}"));
    let own = rustix::process::getpid();
    if rustix::process::getpgrp() != own {
        rustix::process::setpgid(None, None).map_err(|e| refused(e.into()))?;
    }
    process::on_signal(libc::SIGTERM, on_terminate).map_err(refused)?;
    let _ = rustix::process::set_child_subreaper(Some(own));
    let Some(parent) = parent else { return Ok(None) };
    let (woken, wake) = io::pipe().map_err(refused)?;
    let _ = WAKE.set(wake);
    process::on_signal(PARENT_DEATH.as_raw(), on_parent_death).map_err(refused)?;
    rustix::process::set_parent_process_death_signal(Some(PARENT_DEATH)).map_err(|e| refused(e.into()))?;
    // The parent may have died before the line above.
    let alive = rustix::process::getppid().map(Pid::as_raw_nonzero).map(|p| p.get().unsigned_abs());
    if alive != Some(parent) {
        return Err(StageError::Stopped);
    }
    Ok(Some(woken))
}

fn run(
    folder: &Path,
    stop: StopFlag,
    channel: &Arc<Mutex<Channel>>,
    namespaces: &Namespaces,
    woken: Option<PipeReader>,
) -> Result<(), StageError> {
    let spec = AttemptSpec::read(folder)
        .map_err(|e| StageError::bug(format!("cannot read {}: {e}", folder.join(AttemptSpec::FILE).display())))?;
    let kind = grlm_stages::kind(&spec.kind)
        .ok_or_else(|| StageError::bug(format!("this grlm has no stage kind `{}`", spec.kind)))?;
    std::env::set_current_dir(&spec.directory)
        .map_err(|e| StageError::io("enter the working directory", &spec.directory, e))?;
    let sink = Arc::clone(channel);
    let mut cx = StageContext::new(spec.inputs, spec.outputs, spec.scratch, spec.threads, spec.devices, stop, {
        move |event| sink.lock().unwrap_or_else(PoisonError::into_inner).event(event)
    })
    .with_attempt(spec.attempt, spec.out_of_memory)
    .with_models(spec.models)
    .with_simulated_devices(spec.simulated_devices)
    .with_identity(spec.identity);
    if let Some(rows) = &spec.rows {
        cx = cx.with_rows(StoreRows::new(rows, Arc::clone(namespaces), spec.guards));
    }
    note_panics();
    let params = spec.params;
    let stage = move || {
        let _ended = Ended;
        kind.run(&params, &mut cx)
    };
    let stage = thread::Builder::new().name(spec.stage).stack_size(STACK).spawn(stage);
    let stage = stage.map_err(|e| StageError::io("start a thread in", PathBuf::from("the worker"), e))?;
    let mut why = [STAGE_ENDED];
    if woken.is_some_and(|mut woken| woken.read_exact(&mut why).is_ok()) && why == [PARENT_DIED] {
        end_everything();
    }
    stage.join().unwrap_or_else(|panic| Err(StageError::bug(panic_text(panic.as_ref()))))
}

/// Wakes the thread that waits for the stage, also when the stage panicked.
struct Ended;

impl Drop for Ended {
    fn drop(&mut self) {
        wake(STAGE_ENDED);
    }
}

/// Keeps the place of a panic, which the caught value does not have.
fn note_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if let Some(place) = info.location() {
            let mut slot = PANIC_PLACE.lock().unwrap_or_else(PoisonError::into_inner);
            slot.get_or_insert_with(|| format!("{}:{}", place.file(), place.line()));
        }
        print(info);
    }));
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = (panic.downcast_ref::<&str>().copied())
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    let place = PANIC_PLACE.lock().unwrap_or_else(PoisonError::into_inner).take();
    format!("panicked at {}: {text}", place.as_deref().unwrap_or("an unknown place"))
}

/// The error and what caused it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Where events go. A worker that nobody listens to ends: its result would be lost anyway.
struct Channel {
    file: File,
    last_progress: Option<Instant>,
    held: Option<WorkerEvent>,
}

impl Channel {
    fn event(&mut self, event: WorkerEvent) {
        if let WorkerEvent::Progress { done, total, .. } = &event {
            let recent = self.last_progress.is_some_and(|t| t.elapsed() < PROGRESS_EVERY);
            if recent && done < total {
                self.held = Some(event);
                return;
            }
            self.last_progress = Some(Instant::now());
            self.held = None;
        } else {
            self.flush_progress();
        }
        self.send(&Message::Event(event));
    }

    fn flush_progress(&mut self) {
        if let Some(event) = self.held.take() {
            self.last_progress = Some(Instant::now());
            self.send(&Message::Event(event));
        }
    }

    fn send(&mut self, message: &Message) {
        let line = serde_json::to_vec(message).unwrap_or_else(|error| {
            // A metric that is not a number has no JSON form.
            format!("{{\"event\":{{\"kind\":\"log\",\"level\":\"warn\",\"message\":\"{error}\"}}}}").into_bytes()
        });
        if self.file.write_all(&[&line[..], b"\n"].concat()).is_err() {
            end_everything();
        }
    }
}
