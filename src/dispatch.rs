//! The scheduler of a run, tied to the leases of its machine: what the engine asks for starts, and tells of ends.

use std::{fs::File, sync::Arc, time::Instant};

use crate::{
    device::{
        Machine, Unfit,
        host::{HostError, HostLeases, Place},
    },
    schedule::{Scheduler, Start, Task, TaskId},
};

/// Decides what starts; never gives what another run on this machine holds.
#[derive(Debug)]
pub struct Dispatcher {
    machine: Machine,
    scheduler: Scheduler,
    /// Opened with the first start: a run in which everything is cached touches nothing.
    host: Option<HostLeases>,
    epoch: Instant,
}

impl Dispatcher {
    pub fn new(machine: Machine) -> Self {
        let scheduler = Scheduler::new(&machine);
        Self { machine, scheduler, host: None, epoch: Instant::now() }
    }

    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// # Errors
    /// If the task needs more than the machine has.
    pub fn add(&mut self, task: Task) -> Result<(), Unfit> {
        self.scheduler.add(task)
    }

    pub fn remove(&mut self, id: TaskId) {
        self.scheduler.remove(id);
    }

    /// Everything that may start now.
    ///
    /// # Errors
    /// If the folder of leases cannot be used.
    pub fn start(&mut self) -> Result<Vec<Start>, HostError> {
        if self.scheduler.waiting() == 0 {
            return Ok(Vec::new());
        }
        let host = match &mut self.host {
            Some(host) => host,
            empty => {
                let Place { folder, alone } = Place::of_this_machine();
                if let Some(why) = alone {
                    tracing::info!(folder = %folder.display(), why, "leases hold among this user's runs alone");
                }
                empty.insert(HostLeases::open(&folder, &self.machine)?)
            }
        };
        let taking = host.lock()?;
        self.scheduler.set_foreign(taking.others()?);
        let started = self.scheduler.start(self.epoch.elapsed().as_secs_f64());
        if !started.is_empty() {
            taking.commit(self.scheduler.usage())?;
        }
        Ok(started)
    }

    /// The file whose lock says what this run has leased: whoever holds it open keeps that leased, after the end of this
    /// process too. `None` before the first start.
    pub fn held(&self) -> Option<Arc<File>> {
        self.host.as_ref().map(HostLeases::held)
    }

    /// A started task has ended.
    ///
    /// # Errors
    /// If the folder of leases cannot be used.
    pub fn finish(&mut self, id: TaskId) -> Result<(), HostError> {
        self.scheduler.finish(id);
        match &mut self.host {
            Some(host) => host.give_back(self.scheduler.usage()),
            None => Ok(()),
        }
    }

    /// The GPU with this UUID is gone. Returns the waiting tasks that no longer fit this machine, with why.
    pub fn lose(&mut self, uuid: &str) -> Vec<(TaskId, Unfit)> {
        match self.machine.gpus.iter().position(|gpu| gpu.uuid == uuid) {
            Some(index) => self.scheduler.lose(index),
            None => Vec::new(),
        }
    }

    pub fn running(&self) -> usize {
        self.scheduler.running()
    }

    pub fn waiting(&self) -> usize {
        self.scheduler.waiting()
    }

    /// Other runs hold what our tasks wait for: call [`Dispatcher::start`] again within [`Dispatcher::POLL`], also
    /// when none of our own tasks ends.
    pub fn waits_for_others(&self) -> bool {
        self.scheduler.waits_for_others()
    }

    /// What the other runs of this machine hold, in words.
    pub fn others(&self) -> Vec<String> {
        self.host.as_ref().map(HostLeases::survey_others).unwrap_or_default()
    }

    pub const POLL: std::time::Duration = std::time::Duration::from_millis(50);
}
