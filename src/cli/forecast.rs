//! What `grlm plan` says when it is given devices: the run played on them, by the scheduler that would run it, with
//! durations that were recorded or that the user gives.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    time::Duration,
};

use grlm_cache::Store;
use serde_json::json;

use crate::{
    device::Machine,
    engine::{
        foresee::Foreseen,
        history::History,
        measured::Measured,
        work::{NodeId, Permission, Work, producers},
    },
    error::CliError,
    events::human_duration,
    exit_codes::Code,
    pipeline::{hint, read_span},
    simulate::{SimulatedTask, Span, Timeline, simulate},
};

/// How a forecast is made
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Forecast {
    /// How long a stage takes on these devices, as in `train=2h30m`; may be repeated
    #[arg(long = "duration", value_name = "STAGE=TIME", value_parser = duration, requires = "devices")]
    durations: Vec<(String, f64)>,
    /// The same for many stages: a YAML file, `stage: time`
    #[arg(long = "durations", value_name = "FILE", requires = "devices")]
    durations_file: Option<PathBuf>,
    /// As if nothing had run yet
    #[arg(long, requires = "devices")]
    from_scratch: bool,
}

fn duration(text: &str) -> Result<(String, f64), String> {
    let (stage, time) = text.rsplit_once('=').ok_or("expected STAGE=TIME")?;
    let time = read_span(time).ok_or_else(|| format!("`{time}` is no time: expected one as in `90s` or `2h30m`"))?;
    Ok((stage.to_owned(), time.as_secs_f64()))
}

/// Gives a made-up machine what comes with so many GPUs, where this one has less: 16 cores and 128 GiB for each.
pub fn furnish(machine: &mut Machine) {
    let gpus = u32::try_from(machine.gpus.len()).unwrap_or(u32::MAX);
    machine.cpus = machine.cpus.max(gpus.saturating_mul(16));
    machine.memory = machine.memory.max(u64::from(gpus) * (128 << 30));
}

/// A run that was played.
pub struct Foretold {
    timeline: Timeline,
    /// Node of each task.
    nodes: Vec<NodeId>,
    /// Stages whose duration is not known; they count as nothing.
    unknown: Vec<String>,
}

impl Forecast {
    /// Plays what would run, or everything.
    pub fn play(&self, store: &Store, work: &Work, plan: &[Foreseen], machine: &Machine) -> Result<Foretold, CliError> {
        let given = self.given()?;
        let names = || {
            work.nodes
                .iter()
                .flat_map(|node| &node.places)
                .map(|place| work.pipelines[place.pipeline].stages[place.stage].name.as_str())
        };
        let known: BTreeSet<&str> = names().chain(work.nodes.iter().map(|node| &*node.label)).collect();
        if let Some(stage) = given.keys().find(|stage| !known.contains(stage.as_str())) {
            let help = hint::nearest(stage, known.iter().copied()).map(|near| format!("did you mean `{near}`?"));
            return Err(CliError::message(
                Code::Pipeline,
                format!("a time is given for `{stage}`, which is no stage"),
                help,
            ));
        }
        let runs = |id: &NodeId| match &plan[*id] {
            Foreseen::Run { .. } | Foreseen::Maybe { .. } => true,
            Foreseen::UpToDate(_) => self.from_scratch,
            Foreseen::Left => self.from_scratch && work.nodes[*id].permission != Permission::Leave,
        };
        let nodes: Vec<NodeId> = (0..work.nodes.len()).filter(runs).collect();
        let task_of: BTreeMap<NodeId, usize> = nodes.iter().enumerate().map(|(task, id)| (*id, task)).collect();
        let mut unknown = Vec::new();
        let tasks: Vec<SimulatedTask> = nodes
            .iter()
            .map(|&id| {
                let stage = work.stage(id);
                let label = &work.nodes[id].label;
                let measured = Measured::of(store, stage, machine);
                let duration = given
                    .get(label)
                    .or_else(|| given.get(stage.name.as_str()))
                    .copied()
                    .or_else(|| recorded(store, work, id, &measured, input_bytes(&plan[id])))
                    .unwrap_or_else(|| {
                        unknown.push(label.clone());
                        0.0
                    });
                let mut after: Vec<usize> =
                    producers(&work.nodes[id]).filter_map(|producer| task_of.get(&producer).copied()).collect();
                after.sort_unstable();
                after.dedup();
                SimulatedTask { request: measured.request(stage, machine), duration, after }
            })
            .collect();
        let timeline = simulate(&tasks, machine, true)
            .map_err(|unfit| CliError::message(Code::Resources, format!("a stage {unfit}"), None))?;
        Ok(Foretold { timeline, nodes, unknown })
    }

    fn given(&self) -> Result<BTreeMap<String, f64>, CliError> {
        let mut given = BTreeMap::new();
        if let Some(path) = &self.durations_file {
            let wrong = |message: String| {
                let help = "expected lines as in `train: 2h30m`".to_owned();
                CliError::message(Code::Pipeline, format!("{}: {message}", path.display()), Some(help))
            };
            let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
            let map: BTreeMap<String, serde_yaml::Value> =
                serde_yaml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
            for (stage, value) in map {
                let time = match &value {
                    serde_yaml::Value::String(text) => read_span(text).map(|span| span.as_secs_f64()),
                    value => value.as_f64().filter(|seconds| *seconds >= 0.0),
                };
                let time = time.ok_or_else(|| wrong(format!("the time of `{stage}` cannot be read")))?;
                given.insert(stage, time);
            }
        }
        given.extend(self.durations.iter().cloned());
        Ok(given)
    }
}

/// What a stage will read, where that is known.
fn input_bytes(foreseen: &Foreseen) -> Option<u64> {
    let Foreseen::Run { action, .. } = foreseen else { return None };
    Some(action.inputs.values().map(|content| content.size).sum())
}

/// What the stage took: with these very parameters in this pipeline, or in another one on inputs of about the same
/// size; else when this pipeline, or another of the same request, last ran a stage of its name.
fn recorded(store: &Store, work: &Work, id: NodeId, measured: &Measured, input_bytes: Option<u64>) -> Option<f64> {
    let pipeline = &work.pipelines[work.nodes[id].places[0].pipeline].name;
    if let Some(seconds) = measured.seconds_in(pipeline, input_bytes) {
        return Some(seconds);
    }
    let own = work.nodes[id].places[0].pipeline;
    let name = work.stage(id).name.as_str();
    std::iter::once(own).chain((0..work.pipelines.len()).filter(|p| *p != own)).find_map(|pipeline| {
        let key = History::open(store.root(), &work.title(pipeline)).last(name)?;
        Some(store.summary(&key).ok()??.duration_ms as f64 / 1e3)
    })
}

/// Columns of the chart.
const WIDTH: usize = 72;

impl Foretold {
    /// GPUs times hours; a share of a GPU counts for its part.
    fn gpu_hours(&self, machine: &Machine) -> f64 {
        let share = |span: &Span, gpu: usize| match (span.lease.gpu_memory, machine.gpus.get(gpu)) {
            (Some(share), Some(gpu)) if gpu.memory > 0 => share as f64 / gpu.memory as f64,
            _ => 1.0,
        };
        let gpus = |span: &Span| span.lease.gpus.iter().map(|gpu| share(span, *gpu)).sum::<f64>();
        // An empty sum of floats is -0.
        (0.0 + self.timeline.spans.iter().map(|span| (span.to - span.from) * gpus(span)).sum::<f64>()) / 3600.0
    }

    fn core_hours(&self) -> f64 {
        let cores = |span: &Span| f64::from(span.lease.cpus) * (span.to - span.from);
        (0.0 + self.timeline.spans.iter().map(cores).sum::<f64>()) / 3600.0
    }

    pub fn as_json(&self, work: &Work, machine: &Machine) -> serde_json::Value {
        let span = |span: &Span| {
            json!({
                "stage": work.nodes[self.nodes[span.task]].label, "from": span.from, "to": span.to,
                "cpus": span.lease.cpus, "devices": machine.names(&span.lease),
            })
        };
        json!({
            "makespan": self.timeline.makespan, "gpu_hours": self.gpu_hours(machine),
            "core_hours": self.core_hours(), "unknown": self.unknown,
            "spans": self.timeline.spans.iter().map(span).collect::<Vec<_>>(),
        })
    }

    /// Figures, then a line a device.
    pub fn as_text(&self, work: &Work, machine: &Machine) -> String {
        let time = |seconds: f64| human_duration(Duration::from_secs_f64(seconds));
        let mut lines = vec![format!(
            "{} on {machine}: {:.2} GPU-hours, {:.2} core-hours",
            time(self.timeline.makespan),
            self.gpu_hours(machine),
            self.core_hours()
        )];
        let mut rows: Vec<(String, Vec<&Span>)> = Vec::new();
        for (gpu, device) in machine.gpus.iter().enumerate() {
            let spans: Vec<&Span> = self.timeline.on_gpu(gpu).collect();
            let busy = 100.0 * self.timeline.gpu_busy(gpu);
            // Several at once on one GPU take a line each.
            for (lane, spans) in lanes(spans).into_iter().enumerate() {
                let name = if lane == 0 { format!("{} {busy:>3.0} %", device.name) } else { String::new() };
                rows.push((name, spans));
            }
        }
        // What is too short to have its name drawn would take line after line.
        let seen = |span: &&Span| span.to - span.from > 2.0 * self.timeline.makespan / WIDTH as f64;
        let without = self.timeline.spans.iter().filter(|span| span.lease.gpus.is_empty());
        let short = without.clone().filter(|span| !seen(span)).count();
        for (lane, spans) in lanes(without.filter(seen).collect()).into_iter().enumerate() {
            rows.push((if lane == 0 { "no GPU".to_owned() } else { String::new() }, spans));
        }
        let margin = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, spans) in &rows {
            lines.push(format!("{name:<margin$} {}", self.chart(work, spans)).trim_end().to_owned());
        }
        if short > 0 {
            lines.push(format!("not drawn: {short} short stages without GPU"));
        }
        if !self.unknown.is_empty() {
            let stages = briefly(&self.unknown).join(", ");
            lines.push(format!("time not known, so counted as nothing: {stages}; `--duration STAGE=TIME` gives one"));
        }
        lines.join("\n")
    }

    /// `|name----|name--|`, to scale; what is too short for a column is a mere `|`.
    fn chart(&self, work: &Work, spans: &[&Span]) -> String {
        let column = |seconds: f64| (seconds / self.timeline.makespan.max(1e-9) * WIDTH as f64).round() as usize;
        let mut cells = vec![' '; WIDTH + 1];
        for span in spans {
            let (from, to) = (column(span.from), column(span.to));
            let label = work.nodes[self.nodes[span.task]].label.chars().chain(std::iter::repeat('-'));
            for (cell, letter) in cells[from..=to].iter_mut().skip(1).zip(label) {
                *cell = letter;
            }
            (cells[from], cells[to]) = ('|', '|');
        }
        cells.into_iter().collect()
    }
}

/// Labels of stages; of those that several variants have, the stage's name and how many.
fn briefly(labels: &[String]) -> Vec<String> {
    let stage = |label: &String| label.split_once('@').map_or(label.clone(), |(stage, _)| stage.to_owned());
    let mut groups: Vec<(String, Vec<&String>)> = Vec::new();
    for label in labels {
        match groups.iter_mut().find(|(name, _)| *name == stage(label)) {
            Some((_, group)) => group.push(label),
            None => groups.push((stage(label), vec![label])),
        }
    }
    let say = |(stage, group): (String, Vec<&String>)| match group.as_slice() {
        [one] => (*one).clone(),
        several => format!("{stage} ({})", several.len()),
    };
    groups.into_iter().map(say).collect()
}

/// Spreads spans over as few lines as hold them without overlap.
fn lanes(spans: Vec<&Span>) -> Vec<Vec<&Span>> {
    let mut lanes: Vec<Vec<&Span>> = Vec::new();
    for span in spans.into_iter().filter(|span| span.to > span.from) {
        let free = lanes.iter_mut().find(|lane| lane.last().is_none_or(|last| last.to <= span.from));
        match free {
            Some(lane) => lane.push(span),
            None => lanes.push(vec![span]),
        }
    }
    lanes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read() {
        assert_eq!(duration("train=2h30m"), Ok(("train".into(), 9000.0)));
        assert_eq!(duration("train@lr[a=1]=90s"), Ok(("train@lr[a=1]".into(), 90.0)));
        assert!(duration("train").is_err() && duration("train=long").is_err());
    }

    #[test]
    fn stages_of_many_variants_are_named_once() {
        let labels = ["items", "train", "train@a", "tid@b", "train@c"].map(str::to_owned);
        assert_eq!(briefly(&labels), ["items", "train (3)", "tid@b"]);
    }

    #[test]
    fn overlapping_spans_get_lines_of_their_own() {
        let lease = crate::device::Lease { cpus: 1, memory: 0, gpus: Vec::new(), gpu_memory: None };
        let span = |from, to| Span { task: 0, from, to, lease: lease.clone() };
        let spans = [span(0.0, 2.0), span(1.0, 3.0), span(2.0, 4.0), span(3.0, 3.0)];
        let lengths: Vec<usize> = lanes(spans.iter().collect()).iter().map(Vec::len).collect();
        assert_eq!(lengths, [2, 1]);
    }
}
