//! Whether a run fits into the machine's memory, found out before it starts.

use grlm_nn::qwen3::Config;

use super::params::{Method, Params};
use crate::{StageContext, StageError, machine};

/// Says how much memory the run takes.
///
/// # Errors
/// More than the machine has free; with the parameters that would fit.
pub fn check(params: &Params, config: &Config, longest: usize, cx: &mut StageContext) -> Result<(), StageError> {
    let needed = params.memory_of(config, longest, cx.out_of_memory_before());
    let free = machine::available_memory();
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
    match free {
        Some(free) if needed > free => Err(StageError::params(format!(
            "training needs about {} of memory, and {} are free",
            gib(needed),
            gib(free)
        ))
        .help(advice(params, config, longest, free))),
        _ => {
            cx.info(format!("about {} of memory", gib(needed)));
            Ok(())
        }
    }
}

/// The least change of parameters that would fit.
pub fn advice(params: &Params, config: &Config, longest: usize, free: u64) -> String {
    let fits = |tried: &Params| tried.memory_of(config, longest, 0) <= free;
    let mut tried = params.clone();
    if !tried.gradient_checkpointing {
        tried.gradient_checkpointing = true;
        if fits(&tried) {
            return "`gradient_checkpointing: true` would fit".into();
        }
    }
    while tried.batch > 1 && !fits(&tried) {
        tried.batch /= 2;
    }
    let accumulation = params.accumulation * params.batch / tried.batch;
    let small = format!("`gradient_checkpointing: true`, `batch: {}`, `accumulation: {accumulation}`", tried.batch);
    if fits(&tried) {
        return format!("{small} would fit, and train the same");
    }
    if params.method == Method::Full {
        tried.method = Method::Lora;
        if fits(&tried) {
            return format!("`method: lora`, {small} would fit");
        }
    }
    "take a smaller model, or `backend: llamafactory` on GPUs".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_the_least_change_that_fits() {
        let params = Params { method: Method::Full, batch: 64, ..Params::default() };
        let config = params.architecture.config(8192, 1024);
        let whole = params.memory_of(&config, 300, 0);
        let advised = |free: u64| advice(&params, &config, 300, free);
        assert_eq!(advised(whole * 9 / 10), "`gradient_checkpointing: true` would fit");
        let lean = Params { gradient_checkpointing: true, batch: 1, ..params.clone() };
        let least = lean.memory_of(&config, 300, 0);
        let words = advised(least);
        assert!(words.contains("`batch: 1`") && words.contains("train the same"), "{words}");
        let lora = Params { method: Method::Lora, ..lean }.memory_of(&config, 300, 0);
        assert!(lora < least && advised(lora).contains("`method: lora`"));
        assert!(advised(1000).contains("smaller model"));
    }
}
