//! From a lease to a running attempt, and the retries that need nothing from the loop.

use std::{path::PathBuf, time::Duration};

use grlm_stages::{Failure, event::LogLevel};

use super::{Engine, Message, State, Tried};
use crate::{
    device::{Lease, discover},
    engine::{
        attempt::{End, Job, JobInput, JobOutput, Leased, Trial},
        decide::Action,
        work::{NodeId, Permission, Source},
    },
    events::Body,
    executor::{
        Stop,
        report::Report,
        retry::{Retry, RetryPolicy},
    },
    schedule::TaskId,
};

impl Engine<'_> {
    pub(super) fn start_what_fits(&mut self) {
        if !self.may_start() {
            return;
        }
        loop {
            let starts = match self.dispatcher.start() {
                Ok(starts) => starts,
                Err(error) => return self.give_up(error.into()),
            };
            let mut given_back = false;
            for start in starts {
                given_back |= !self.start(start.id.0, start.lease);
            }
            if !given_back {
                return;
            }
        }
    }

    /// Starts a node, unless another process works on the same action: then its lease goes back.
    fn start(&mut self, id: NodeId, lease: Lease) -> bool {
        let State::Queued(action) = std::mem::replace(&mut self.states[id], State::Waiting) else { return true };
        let key = action.key;
        let lock = match self.workshop.store.try_lock_action(&key) {
            Ok(Some(lock)) => lock,
            Ok(None) => {
                self.states[id] = State::Elsewhere(action);
                self.elsewhere.push(id);
                if let Err(error) = self.dispatcher.finish(TaskId(id)) {
                    self.give_up(error.into());
                }
                let who = self.workshop.store.lock_holder(&key).map(|holder| holder.process);
                let who = who.map_or("another process".into(), |p| format!("process {} on {}", p.pid, p.host));
                let message = format!("waits for {who}, which does the same");
                self.emit(Some(id), None, Body::Log { level: LogLevel::Info, message });
                return false;
            }
            Err(error) => {
                self.give_up(error.into());
                return true;
            }
        };
        self.states[id] = State::Running(action.clone());
        self.running += 1;
        let job = self.job(id, *action);
        let stage = self.work.stage(id);
        let shrinks = stage.kind.shrinks();
        let policy = RetryPolicy { retries: stage.retries, shrinks };
        let learnt = self.outlook().measured[id].as_ref().map_or(0, |measured| measured.out_of_memory);
        let mut tried = *self.tried.entry(id).or_insert(Tried { attempts: 0, out_of_memory: learnt });
        let shares = lease.gpu_memory.is_some() && !lease.gpus.is_empty();
        let (workshop, stop, sender) = (self.workshop.clone(), self.stop.1.clone(), self.sender.clone());
        // Whatever comes after so many attempts shares the last one's log.
        let most = tried.attempts.saturating_add(policy.retries.unwrap_or(3).min(1000) + 2);
        let logs: Vec<PathBuf> = (1..=most).map(|n| self.journal.log(&job.label, n)).collect();
        let machine = self.dispatcher.machine();
        let gpus = machine.visible_devices(&lease);
        let simulated = lease.gpus.len() - gpus.len();
        let leased = Leased { cpus: lease.cpus as usize, gpus, simulated, held: self.dispatcher.held() };
        let devices = machine.names(&lease);
        self.leases.insert(id, lease);
        tokio::task::spawn_local(async move {
            let _lock = lock;
            let end = loop {
                let log = &logs[(tried.attempts as usize).min(logs.len() - 1)];
                tried.attempts += 1;
                let number = tried.attempts;
                let say = |body| {
                    let _ = sender.send(Message::Event(id, number, body));
                };
                say(Body::Started { cpus: leased.cpus, devices: devices.clone() });
                let mut report = Report::new(log);
                let mut pass_on = |event| {
                    if let Some(body) = Body::from_worker(event) {
                        report.tell(&body);
                        say(body);
                    }
                };
                let trial = Trial { number, out_of_memory: tried.out_of_memory, log };
                let end = workshop.attempt(&job, &trial, &leased, stop.clone(), &mut pass_on).await;
                match &end {
                    Ok(end) => end.told().into_iter().for_each(|body| report.end(&body)),
                    Err(error) => report.end(&Body::failed(error.as_failure(), Duration::ZERO, None)),
                }
                let Ok(End::Failed { failure, duration }) = &end else { break end };
                let (failure, duration) = (failure.clone(), *duration);
                if *stop.borrow() != Stop::No {
                    break end;
                }
                let lost = gone(&leased.gpus, failure.failure).await;
                let out_of_memory = failure.failure == Failure::OutOfMemory;
                let retry = policy.decide(failure.failure, number);
                // A share that was too small says nothing about the whole GPU; a GPU that is gone, nothing of the stage.
                if (!lost.is_empty() && number < MOST_ATTEMPTS) || (out_of_memory && shares) {
                    tried.out_of_memory += u32::from(out_of_memory && shrinks);
                    break Ok(End::Again { failure, duration, lost });
                }
                let Retry::After(pause) = retry else { break end };
                tried.out_of_memory += u32::from(out_of_memory);
                if out_of_memory && !leased.gpus.is_empty() {
                    // Others may use the devices meanwhile.
                    break Ok(End::Again { failure, duration, lost });
                }
                say(Body::failed(failure, duration, Some(pause)));
                let mut stopped = stop.clone();
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = stopped.wait_for(|s| *s != Stop::No) => {}
                }
            };
            let _ = sender.send(Message::Ended(id, Box::new(end), tried));
        });
        true
    }

    fn job(&self, id: NodeId, action: Action) -> Job {
        let stage = self.work.stage(id);
        let inputs = self.work.nodes[id]
            .sources
            .iter()
            .map(|(port, source)| {
                let input = match source {
                    Source::File(path) => JobInput::File(path.clone()),
                    Source::Output { node, port, file } => JobInput::Stored {
                        file: file.clone(),
                        from: format!("{}.{port}", self.work.nodes[*node].label),
                    },
                };
                (port.clone(), input)
            })
            .collect();
        let output = |o: &grlm_stages::Output| JobOutput {
            port: o.name.to_string(),
            file: o.file.to_string(),
            artifact: o.artifact,
            may_be_empty: o.may_be_empty,
        };
        Job {
            label: self.work.nodes[id].label.clone(),
            pipeline: self.work.title(self.work.nodes[id].places[0].pipeline),
            kind: stage.kind.name(),
            params: stage.params.clone(),
            action,
            inputs,
            outputs: stage.outputs.iter().map(output).collect(),
            timeout: stage.timeout,
            env: stage.env.clone(),
            pass_env: stage.pass_env.clone(),
            secrets: stage.secrets.clone(),
            forced: self.work.nodes[id].permission == Permission::Force,
        }
    }
}

/// However often devices get lost, a stage is not tried more often than this.
const MOST_ATTEMPTS: u32 = 10;

/// Of the leased GPUs, those that are gone. Only failures that a lost GPU can explain are worth the question.
async fn gone(gpus: &[String], failure: Failure) -> Vec<String> {
    if gpus.is_empty() || matches!(failure, Failure::WrongInput | Failure::Stopped) {
        return Vec::new();
    }
    let gpus = gpus.to_vec();
    tokio::task::spawn_blocking(move || discover::missing(&gpus)).await.unwrap_or_default()
}
