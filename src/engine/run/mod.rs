//! The loop: decide what is known, start what fits, publish what ends, until nothing is left.
//!
//! It runs on one thread, the one that lives as long as the program: workers die with it.

mod end;
mod finish;
mod start;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use grlm_cache::{ActionKey, Content, Store, StoreError};
use grlm_stages::{Failure, event::LogLevel};
use tokio::{sync::mpsc, task::LocalSet};

use super::{
    attempt::{AttemptError, End, Workshop},
    decide::{self, Action, Answer, Files, FilesError},
    history::History,
    outlook::Outlook,
    rows, secrets,
    work::{NodeId, Permission, Source, Work},
};
use crate::{
    device::{Lease, Machine, Unfit, host::HostError},
    dispatch::Dispatcher,
    events::{Body, Counts, Event, Outcome, now},
    executor::{AttemptFailure, Launcher, Stop, StopReceiver, StopSender, interrupt, stop_channel},
    journal::{Journal, JournalError, RunId},
    progress::Reporter,
    schedule::{Task, TaskId},
};

/// How a request is carried out.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where results are shown.
    pub out: PathBuf,
    pub keep_going: bool,
    /// What the user calls the run.
    pub name: Option<String>,
    /// The command line, for the journal.
    pub command: Vec<String>,
}

/// What became of a run.
#[derive(Debug)]
pub struct Ended {
    pub outcome: Outcome,
    pub counts: Counts,
    /// Per node: its key and outputs, where it has them.
    pub results: Vec<Option<Done>>,
    /// The users' files as they were taken for this run.
    pub files: Files,
}

/// A node's result.
#[derive(Debug, Clone)]
pub struct Done {
    pub key: ActionKey,
    pub outputs: BTreeMap<String, Content>,
}

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Devices(#[from] HostError),
    /// A file or model of the user's that cannot be taken, or a server's key that is not there.
    #[error("{message}")]
    File { message: String, help: Option<String> },
    /// A result is in the store, and cannot be shown.
    #[error("cannot show `{output}` at {}", path.display())]
    Show { output: String, path: PathBuf, source: StoreError },
    #[error("cannot {action}")]
    Io { action: &'static str, source: io::Error },
}

impl From<FilesError> for RunError {
    fn from(error: FilesError) -> Self {
        let message = error.to_string();
        match error {
            FilesError::Store(error) => error.into(),
            FilesError::Odd { help, .. } | FilesError::Model { help, .. } => Self::File { message, help },
        }
    }
}

/// A run that does nothing for so long, since others hold what it needs, says so.
const IDLE: Duration = Duration::from_secs(2);

/// The life of a node.
#[derive(Debug)]
enum State {
    /// Some input is not known yet.
    Waiting,
    /// To run as soon as devices are free.
    Queued(Box<Action>),
    /// Another node does the same work now.
    Twin,
    /// Another process does the same work now; it holds its lock, and we hold no devices meanwhile.
    Elsewhere(Box<Action>),
    Running(Box<Action>),
    Done(Done),
    Failed,
    Skipped,
}

/// What a running attempt tells the loop.
enum Message {
    Event(NodeId, u32, Body),
    Ended(NodeId, Box<Result<End, AttemptError>>, Tried),
}

/// How often a node was tried so far.
#[derive(Debug, Clone, Copy, Default)]
struct Tried {
    attempts: u32,
    out_of_memory: u32,
}

struct Engine<'a> {
    work: &'a Work,
    options: &'a Options,
    workshop: Workshop,
    files: Files,
    dispatcher: Dispatcher,
    journal: Journal,
    reporter: &'a mut dyn Reporter,
    histories: Vec<History>,
    states: Vec<State>,
    /// Nodes that may have become decidable.
    open: Vec<NodeId>,
    counts: Counts,
    stop: (StopSender, StopReceiver),
    failed: bool,
    started: Instant,
    running: usize,
    /// Actions that are queued or run, and the nodes that wait for each beside the one that runs it.
    active: HashMap<ActionKey, Vec<NodeId>>,
    /// What earlier runs took, and the longest path that follows from it.
    /// Made when the first node is queued: a run in which everything is cached needs none.
    outlook: Option<Outlook>,
    /// Nodes that other processes work on.
    elsewhere: Vec<NodeId>,
    /// What running nodes were given.
    leases: HashMap<NodeId, Lease>,
    tried: HashMap<NodeId, Tried>,
    /// Since when this run does nothing but wait for what other runs hold; told or not.
    idle: Option<(Instant, bool)>,
    error: Option<RunError>,
    sender: mpsc::UnboundedSender<Message>,
}

/// Runs everything that `work` permits.
///
/// # Errors
/// The store or the journal cannot be used; something is missing without which a stage cannot run. Stages that fail are
/// no error: see [`Ended::outcome`].
pub fn run(
    store: Arc<Store>,
    work: &Work,
    machine: Machine,
    options: &Options,
    reporter: &mut dyn Reporter,
) -> Result<Ended, RunError> {
    let io = |action| move |source| RunError::Io { action, source };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io("start the runtime"))?;
    let names: Vec<String> = (0..work.pipelines.len()).map(|p| work.title(p)).collect();
    let variant = (work.pipelines.len() == 1).then(|| work.pipelines[0].variant.clone()).flatten();
    let name = work.pipelines.first().map(|p| p.name.clone()).unwrap_or_default();
    let mut journal = Journal::create(&store.runs_dir(), &name, variant.as_deref(), options.command.clone())?;
    let id = journal.id().clone();
    if let Some(name) = &options.name {
        journal.set_name(name)?;
    }
    let directory = std::env::current_dir().map_err(io("find the working directory"))?;
    let files = match begin(&store, work) {
        Ok(files) => files,
        Err(error) => {
            finish::close_unbegun(&mut journal, id);
            return Err(error);
        }
    };
    let histories = names.iter().map(|title| History::open(store.root(), title)).collect();
    let (sender, receiver) = mpsc::unbounded_channel();
    let run = id.as_str().to_owned();
    let mut engine = Engine {
        work,
        options,
        outlook: None,
        workshop: Workshop { store, launcher: Launcher::this_program(), directory, run },
        files,
        dispatcher: Dispatcher::new(machine),
        journal,
        reporter,
        histories,
        states: work.nodes.iter().map(|_| State::Waiting).collect(),
        open: Vec::new(),
        counts: Counts::default(),
        stop: stop_channel(),
        failed: false,
        started: Instant::now(),
        running: 0,
        active: HashMap::new(),
        elsewhere: Vec::new(),
        leases: HashMap::new(),
        tried: HashMap::new(),
        idle: None,
        error: None,
        sender,
    };
    engine.emit(
        None,
        None,
        Body::RunStarted { version: crate::events::VERSION, pipeline: name, variant, stages: work.nodes.len() },
    );
    LocalSet::new().block_on(&runtime, engine.drive(receiver));
    engine.finish(&names)
}

impl Engine<'_> {
    async fn drive(&mut self, mut messages: mpsc::UnboundedReceiver<Message>) {
        let (asked, mut stops) = mpsc::unbounded_channel();
        let signals = tokio::task::spawn_local(interrupt::on_ctrl_c(self.stop.0.clone(), move |stop| {
            let _ = asked.send(stop);
        }));
        self.open.extend((0..self.work.nodes.len()).rev());
        self.settle();
        loop {
            self.start_what_fits();
            self.tell_idleness();
            let poll = (self.dispatcher.waits_for_others() || !self.elsewhere.is_empty()) && self.may_start();
            if self.running == 0 && !poll {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep(Dispatcher::POLL), if poll => self.look_elsewhere(),
                message = messages.recv() => match message {
                    Some(Message::Event(id, attempt, body)) => {
                        if let Body::Metric { name, value: Some(seconds), .. } = &body
                            && name == rows::SECONDS_PER_ROW
                        {
                            let seconds = *seconds;
                            self.learn(id, |measured| measured.seconds_per_row = Some(seconds));
                        }
                        self.emit(Some(id), Some(attempt), body);
                    }
                    Some(Message::Ended(id, end, tried)) => self.ended(id, *end, tried),
                    None => break,
                },
                Some(stop) = stops.recv() => {
                    self.emit(None, None, Body::Stopping { at_once: stop == Stop::Now });
                }
            }
        }
        signals.abort();
    }

    /// Says, once a wait, for whom the run waits when it can do nothing else: it looks as if it hung.
    fn tell_idleness(&mut self) {
        if self.running > 0 || !self.dispatcher.waits_for_others() {
            self.idle = None;
            return;
        }
        let (since, told) = *self.idle.get_or_insert_with(|| (Instant::now(), false));
        if told || since.elapsed() < IDLE {
            return;
        }
        self.idle = Some((since, true));
        let next = (0..self.states.len()).find(|id| matches!(self.states[*id], State::Queued(_)));
        let message = format!("waits for what other runs hold: {}", self.dispatcher.others().join("; "));
        self.emit(next, None, Body::Log { level: LogLevel::Info, message });
    }

    /// Decides nodes until no decision follows from another.
    fn settle(&mut self) {
        while let Some(id) = self.open.pop() {
            self.consider(id);
        }
    }

    /// Decides a node whose inputs may all be known now.
    fn consider(&mut self, id: NodeId) {
        if !matches!(self.states[id], State::Waiting) || self.work.nodes[id].permission == Permission::Leave {
            return;
        }
        let mut inputs = BTreeMap::new();
        for (port, source) in &self.work.nodes[id].sources {
            let content = match source {
                Source::File(path) => self.files.get(path).copied(),
                Source::Output { node, port, .. } => match &self.states[*node] {
                    State::Done(done) => done.outputs.get(port).copied(),
                    State::Failed | State::Skipped => {
                        let because = format!("`{}` has no result", self.work.nodes[*node].label);
                        return self.skip(id, because);
                    }
                    _ => return,
                },
            };
            let Some(content) = content else { return };
            inputs.insert(port.clone(), content);
        }
        let action = Action::new(self.work.stage(id), inputs, &self.files);
        let answer = match decide::look_up(&self.workshop.store, &action.key) {
            Ok(answer) => answer,
            Err(error) => return self.give_up(error.into()),
        };
        let permission = self.work.nodes[id].permission;
        match answer {
            Answer::Ready(record)
                if permission != Permission::Force && self.workshop.store.touch_record(&action.key, record.used_ms) =>
            {
                let saved = Some(record.duration_ms as f64 / 1e3);
                self.emit(Some(id), None, Body::Cached { saved, key: Some(action.key) });
                self.done(id, Done { key: action.key, outputs: record.outputs });
            }
            answer => {
                let place = self.work.nodes[id].places[0];
                let stage = self.work.stage(id).name.to_string();
                let reason = match (permission, &answer) {
                    (Permission::Force, Answer::Ready(_)) => "forced".to_owned(),
                    _ => {
                        decide::reason(&self.workshop.store, &answer, &action, &self.histories[place.pipeline], &stage)
                    }
                };
                if permission == Permission::UseOnly {
                    let message = format!("its result is needed and not up to date ({reason})");
                    let help = Some(format!("run it first: `--until {stage}`"));
                    return self.fail(id, AttemptFailure { failure: Failure::WrongInput, message, help, tail: vec![] });
                }
                if let Some(twins) = self.active.get_mut(&action.key) {
                    twins.push(id);
                    self.states[id] = State::Twin;
                    return;
                }
                self.active.insert(action.key, Vec::new());
                if self.queue(id, Box::new(action)) {
                    let estimate = self.outlook().estimate(id);
                    self.emit(Some(id), None, Body::Queued { reason, estimate });
                }
            }
        }
    }

    /// Lets a node wait for devices. Whether it can ever have what it needs; if not, it has failed.
    fn queue(&mut self, id: NodeId, action: Box<Action>) -> bool {
        let stage = self.work.stage(id);
        let outlook = self.outlook();
        let (priority, estimate) = (outlook.remaining[id], outlook.estimate(id));
        let measured = outlook.measured[id].clone();
        let request = match measured {
            Some(measured) => measured.request(stage, self.dispatcher.machine()),
            None => stage.resources.into(),
        };
        let (key, task) = (action.key, Task { id: TaskId(id), request, priority, estimate });
        self.states[id] = State::Queued(action);
        let added = self.dispatcher.add(task);
        if let Err(unfit) = &added {
            self.unfit(id, unfit, key);
        }
        added.is_ok()
    }

    fn outlook(&mut self) -> &mut Outlook {
        let (store, work, machine) = (&self.workshop.store, self.work, self.dispatcher.machine());
        self.outlook.get_or_insert_with(|| Outlook::new(store, work, machine))
    }

    fn unfit(&mut self, id: NodeId, unfit: &Unfit, key: ActionKey) {
        let message = unfit.to_string();
        self.fail(id, AttemptFailure { failure: Failure::WrongInput, message, help: None, tail: vec![] });
        self.release_twins(key);
    }

    /// Nodes that wait for the one that did their work decide for themselves.
    fn release_twins(&mut self, key: ActionKey) {
        for twin in self.active.remove(&key).unwrap_or_default() {
            self.states[twin] = State::Waiting;
            self.open.push(twin);
        }
    }

    /// Looks whether other processes have done with what we wait for: then it is decided anew.
    fn look_elsewhere(&mut self) {
        for id in std::mem::take(&mut self.elsewhere) {
            let State::Elsewhere(action) = &self.states[id] else { continue };
            let key = action.key;
            match self.workshop.store.try_lock_action(&key) {
                Ok(None) => self.elsewhere.push(id),
                Ok(Some(_)) => {
                    self.states[id] = State::Waiting;
                    self.open.push(id);
                    self.release_twins(key);
                }
                Err(error) => return self.give_up(error.into()),
            }
        }
        self.settle();
    }

    /// Nothing has happened after which no further stage may start.
    fn may_start(&self) -> bool {
        *self.stop.1.borrow() == Stop::No && (!self.failed || self.options.keep_going) && self.error.is_none()
    }

    /// A node has its result: it is shown, and what waited for it is decided.
    fn done(&mut self, id: NodeId, done: Done) {
        let shown = self.show(id, &done);
        for place in &self.work.nodes[id].places {
            let stage = &self.work.pipelines[place.pipeline].stages[place.stage];
            self.histories[place.pipeline].remember(stage.name.as_str(), done.key);
        }
        self.states[id] = State::Done(done);
        match shown {
            Ok(()) => self.open.extend_from_slice(&self.work.nodes[id].dependents),
            Err(error) => self.give_up(error),
        }
    }

    fn show(&self, id: NodeId, done: &Done) -> Result<(), RunError> {
        for place in &self.work.nodes[id].places {
            let pipeline = &self.work.pipelines[place.pipeline];
            let stage = &pipeline.stages[place.stage];
            let folder = self.options.out.join(pipeline.out_name()).join(stage.name.as_str());
            for output in &stage.outputs {
                let Some(content) = done.outputs.get(output.name.as_ref()) else { continue };
                let path = folder.join(output.file.as_ref());
                if let Err(source) = self.workshop.store.materialise(content, &path) {
                    return Err(RunError::Show { output: format!("{}.{}", stage.name, output.name), path, source });
                }
            }
        }
        Ok(())
    }

    fn fail(&mut self, id: NodeId, failure: AttemptFailure) {
        self.fail_after(id, failure, Duration::ZERO);
    }

    fn fail_after(&mut self, id: NodeId, failure: AttemptFailure, duration: Duration) {
        self.failed = true;
        self.emit(Some(id), None, Body::failed(failure, duration, None));
        self.states[id] = State::Failed;
        self.open.extend_from_slice(&self.work.nodes[id].dependents);
    }

    fn skip(&mut self, id: NodeId, because: String) {
        if matches!(self.states[id], State::Skipped) {
            return;
        }
        self.emit(Some(id), None, Body::Skipped { because });
        self.states[id] = State::Skipped;
        self.open.extend_from_slice(&self.work.nodes[id].dependents);
    }

    /// The store or the journal failed: nothing more is started.
    fn give_up(&mut self, error: RunError) {
        self.stop.0.ask(Stop::Save);
        self.error.get_or_insert(error);
    }

    fn emit(&mut self, id: Option<NodeId>, attempt: Option<u32>, body: Body) {
        self.counts.count(&body);
        let stage = id.map(|id| self.work.nodes[id].label.clone());
        let Some(run) = RunId::parse(&self.workshop.run) else { return };
        let event = Event { t: now(), run, stage, attempt, body };
        self.reporter.event(&event);
        if let Err(error) = self.journal.append(&event) {
            self.error.get_or_insert(error.into());
        }
    }
}

/// The users' files and models, and what else stages will need from outside: found to be missing now, and not when the
/// stages before them have run for hours.
fn begin(store: &Store, work: &Work) -> Result<Files, RunError> {
    let files = Files::digest(store, work)?;
    files.check_models(work)?;
    secrets::check(store, work)?;
    Ok(files)
}
