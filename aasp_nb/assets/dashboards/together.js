function initialize({ model }) {
  let queue = Promise.resolve();  // one bundle after the other: a later one must not overtake
  model.on('change:bundle', () => {
    const bundle = model.get('bundle');
    queue = queue.then(async () => { for (const id of Object.keys(bundle))
      (await model.widget_manager.get_model(id)).set_state(bundle[id]); }).catch(e => console.error(e));
  });
}
export default { initialize };
