// Search in pages that are read from the disk: a browser starts no worker from file://, so its script runs in a frame.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {  // the name by which Material's search looks for its languages
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      const load = source => new Promise((resolve, reject) => {
        const script = this.inside.document.createElement("script")
        Object.assign(script, {src: source, onload: resolve, onerror: reject})
        this.inside.document.head.append(script)
      })
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
      this.inside.importScripts = (...sources) => sources.reduce((before, each) => before.then(() => load(each)), Promise.resolve())
      this.loaded = load(url)
    }

    postMessage(data) {
      this.loaded.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data})))
    }
  }
  window.Worker = window.IFrameWorker
}
