//! The loop that ties pipelines, keys, store, devices and workers together.
//!
//! | file | owns |
//! |---|---|
//! | `work` | the graph of a request, and which of it may run |
//! | `decide` | whether a stage has to run, and why |
//! | `history` | what each stage stood for last time |
//! | `nearest` | which earlier result differs least |
//! | `attempt` | one action from lock to record |
//! | `outputs` | what an attempt wrote, checked and taken in |
//! | `content` | what cannot be stored, in words |
//! | `names` | paths of an attempt as its user knows them |
//! | `measured` | what stages were seen to need |
//! | `rows` | how many rows of a stage are missing |
//! | `secrets` | keys of servers that a run will need |
//! | `outlook` | what follows from that for the order of stages |
//! | `foresee` | what a run would do |
//! | `run` | the loop |
//! | `shortcut` | the loop spared, where nothing at all has changed |

pub mod attempt;
mod content;
pub mod decide;
pub mod foresee;
pub mod history;
pub mod measured;
mod models;
mod names;
pub mod nearest;
mod outlook;
mod outputs;
pub mod rows;
pub mod run;
pub mod secrets;
pub mod shortcut;
pub mod work;
